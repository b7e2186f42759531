"""The Wiro client. Not written yet; `docs` of the plan: signing, tasks, files, journal."""
