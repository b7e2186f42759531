"""Nodes that run models on wiro.ai, and the server side of their page.

Nodes: `nodes` and `batch` are the classes, `widgets` and `inputs` turn what they are given into
parameters and files, `run` is one run from price to result, `decode` reads the result's files.

Page: `routes` is the HTTP side, `guard` decides who may do what, `settings`, `tasks`, `models` and
`prices` answer.

Both: `account` has the key, the journal and the client, `live_tasks` the state of running tasks,
`autocollect` what happens when ComfyUI starts.
"""
