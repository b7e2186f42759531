// Texts in the page's language: which file a locale has, what a text becomes, what stays English.
import assert from "node:assert/strict";
import { afterEach, test } from "node:test";

import { LANGUAGES, languageOf, loadLanguage, t } from "../../web/wiro/language.mjs";
import { badgeOf } from "../../web/wiro/price.mjs";
import { FILTERS, groupOf, toCsv } from "../../web/wiro/table.mjs";
import { describe, keyLine, limitLine, spentLine } from "../../web/wiro/words.mjs";

const ACCOUNT = {
  has_key: true, source: "file", is_locked: false, is_shared: false, has_default_limits: true,
  limits: { per_run: "2", per_day: "20", per_month: null }, spent: { day: "0.5", month: "3" },
};
const TASK = {
  id: 1, taskid: "2221", model: "wiro/SkyReels-V1", state: "ended", verdict: "succeeded",
  phase: "ended", cost: "", projected: "", elapsed_s: "", created_at: 1000, updated_at: 1000,
  is_live: false, remote_deleted: false, error: "", files: [{ filename: "0.mp4" }],
};

afterEach(() => loadLanguage(""));

test("a locale has its own file, else that of its language, else English", () => {
  const cases = [["zh", "zh"], ["zh-TW", "zh"], ["en", ""], ["fr", ""], ["", ""], [undefined, ""],
                 ["constructor", ""], ["__proto__", ""]];
  for (const [locale, language] of cases) assert.equal(languageOf(locale), language);
});

test("without a file a text is English, with its values filled in", () => {
  assert.equal(t("Spent {day} today, {month} this month", { day: "$1", month: "{day}" }),
               "Spent $1 today, {day} this month");
  assert.equal(t("about {amount}", {}), "about {amount}");
  assert.equal(t("toString"), "toString");
});

for (const language of LANGUAGES) {
  test(`${language}: lines, badges and filters are translated, values are not`, async () => {
    const lines = () => [
      keyLine(ACCOUNT), limitLine(ACCOUNT).text, spentLine(ACCOUNT),
      badgeOf({ has_key: true, price: "1.5", is_exact: false, is_each: true }, ACCOUNT).parts.join(),
      ...FILTERS.map(([, text]) => t(text)),
    ];
    const english = lines();
    await loadLanguage(language);
    lines().forEach((text, index) => {
      assert.notEqual(text, english[index]);
      assert.deepEqual(text.match(/[\d.]+/g)?.toSorted(), english[index].match(/[\d.]+/g)?.toSorted());
    });
  });

  test(`${language}: what is exported and compared stays English`, async () => {
    const before = [describe(TASK).word, groupOf(TASK), toCsv([TASK])];
    await loadLanguage(language);
    assert.deepEqual([describe(TASK).word, groupOf(TASK), toCsv([TASK])], before);
  });
}
