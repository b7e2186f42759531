// The texts of the page's language. English is the key; each other language has a file in lang/.

/** Languages with a file; all others show English. */
export const LANGUAGES = ["zh"];

let texts = {};

/** A text in the page's language, with `{name}` replaced by the value of that name. */
export function t(english, values = {}) {
  const text = Object.hasOwn(texts, english) ? texts[english] : english;
  return text.replace(/\{(\w+)\}/g, (whole, name) =>
    Object.hasOwn(values, name) ? String(values[name]) : whole,
  );
}

/** Marks a text that is passed to `t` where it is shown. */
export const mark = (english) => english;

/** The language with a file that a locale such as "zh" or "zh-TW" stands for; "" for English. */
export function languageOf(locale) {
  const wanted = typeof locale === "string" ? locale : "";
  return LANGUAGES.find((language) => [wanted, wanted.split("-")[0]].includes(language)) ?? "";
}

/** Take the texts of a language from now on. What is on the page already stays as it is. */
export async function loadLanguage(language) {
  texts = language ? (await import(`./lang/${language}.mjs`)).default : {};
}
