"""Write locales/en from its sources, and list what the other languages lack.

    python tests/scripts/locales.py [--translated LANGUAGE]

The exit code is 0 only if every language is complete. --translated records that a language's texts
fit the English of today; until then a text whose English has changed is listed as stale.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import locales


def write_english() -> None:
    for name, tree in locales.english_files().items():
        path = locales.LOCALES / "en" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(locales.as_json(tree), encoding="utf-8")


def record(language: str) -> None:
    known = json.loads(locales.read(locales.TRANSLATED))
    source = locales.english()
    texts = locales.texts_in(language)
    known[language] = {key: locales.digest(source[key]) for key in sorted(source) if key in texts}
    locales.TRANSLATED.write_text(locales.as_json(known), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="texts of the page in every language")
    parser.add_argument("--translated", metavar="LANGUAGE", choices=locales.languages())
    options = parser.parse_args()
    write_english()
    if options.translated:
        record(options.translated)
    lines = [f"{one}: {line}" for one in locales.languages() for line in locales.problems_of(one)]
    print("\n".join(lines) or "every language is complete")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
