// A model's parameters as a form, and the form as JSON: whatever the model says and whatever is typed.
import assert from "node:assert/strict";
import { test } from "node:test";

import {
  applyExample, dropMember, examplesOf, factsOf, fieldsOf, resetField, groupsOf, isWiroPage, membersOf,
  placeOf, setMember, setPlace, shorten, shownIn, socketsFor, typeInto, unknownKeys,
} from "../../web/wiro/schema.mjs";

const ITEM = {
  id: "a", type: "text", label: "A", help: "what it is", placeholder: "p", is_required: true,
  is_advanced: false, default: "x", options: [{ value: "v", label: "V" }], min: 0, max: 10, step: 1,
  files: null,
};
const FILE = { kind: "image", takes_many: false };
const MODEL = {
  groups: [
    {
      title: "Inputs",
      items: [
        { ...ITEM, id: "prompt", type: "textarea", options: [], default: "" },
        { ...ITEM, id: "seed", type: "number", options: [], min: null, max: null, default: 7 },
        { ...ITEM, id: "scale", type: "range", options: [], default: 6.5, is_required: false },
        { ...ITEM, id: "size", type: "select" },
        { ...ITEM, id: "loop", type: "checkbox", options: [], default: true },
        { ...ITEM, id: "photo", type: "fileinput", options: [], files: FILE, default: "" },
        { ...ITEM, id: "more", type: "multifileinput", options: [], files: { ...FILE, takes_many: true } },
        { ...ITEM, id: "any", type: "combinefileinput", options: [], files: { kind: "", takes_many: true } },
      ],
    },
  ],
  examples: [
    { prompt: "a fox", seed: 3, photoUrl: "https://a.example/x.png", photo: "f", size: "v" },
    { callbackUrl: "https://evil.example", projectid: "1", "Web-Hook": "x", unknown: 1 },
    { prompt: "see https://evil.example/x", any: ["https://a.example/1"] },
  ],
};
const GROUPS = groupsOf(MODEL);
const [prompt, seed, scale, size, loop, photo, more, any] = fieldsOf(GROUPS);

const deep = JSON.parse("[".repeat(500) + "]".repeat(500));
const round = {};
round.self = round;
const NONSENSE = [
  undefined, null, true, false, 0, -1, 1.5, NaN, Infinity, -Infinity, 1e300, 2 ** 60, "", " ", "\n",
  "x".repeat(300_000), "<img src=x onerror=alert(1)>", "javascript:alert(1)", "\ud800", "\u0000",
  "\u202e", "__proto__", "constructor", "toString", "callbackUrl", "PROJECT-ID", "webhook_secret",
  "a\"b", "a\\", "[", "{}", [], {}, [[]], [null], [undefined], [{}], deep, round, [1, "a", {}],
  { id: 1 }, { value: {} }, { length: 5 }, { kind: "image", takes_many: 1 }, Array(5000).fill("x"),
  Array(900).fill({ value: "v", label: "V" }), Object.create(null), { items: "x" }, [{ items: 7 }],
];

test("nonsense in any place of a model gives a form that is bounded and works", () => {
  assert.ok(NONSENSE.length >= 40);
  let count = 0;
  const check = (model) => {
    count += 1;
    const groups = groupsOf(model);
    for (const field of fieldsOf(groups)) {
      for (const name of ["id", "label", "placeholder"]) {
        assert.equal(typeof field[name], "string");
        assert.ok(field[name].length <= 200);
      }
      assert.ok(field.help.length <= 2000 && field.options.length <= 2000);
      assert.ok(factsOf(field).length < 1000);
      assert.ok(["text", "long", "number", "choice", "flag", "file"].includes(field.kind));
      for (const typed of ["", "1", "x", "__proto__"]) {
        const { json } = typeInto("{}", field, typed);
        assert.notEqual(membersOf(json).members, null, json);
        shownIn(json, field);
        assert.equal(resetField(json, field), "{}");
      }
      socketsFor(field);
    }
    for (const example of examplesOf(model, groups)) {
      assert.ok(example.line.length <= 210);
      assert.notEqual(membersOf(applyExample("{}", example, true)).members, null);
    }
    unknownKeys('{"a": 1}', groups);
  };
  for (const nonsense of NONSENSE) {
    check(nonsense);
    for (const name of ["groups", "examples", "title", "page", "slug"]) check({ ...MODEL, [name]: nonsense });
    check({ ...MODEL, groups: [nonsense] });
    check({ ...MODEL, examples: [nonsense] });
    check({ ...MODEL, examples: [{ prompt: nonsense, photo: nonsense }] });
    for (const name of ["title", "items"]) check({ groups: [{ title: "t", items: [ITEM], [name]: nonsense }] });
    for (const type of ["text", "textarea", "number", "select", "checkbox", "fileinput", "combinefileinput"]) {
      for (const name of Object.keys(ITEM)) {
        check({ groups: [{ items: [{ ...ITEM, type, [name]: nonsense }] }], examples: [{ a: nonsense }] });
      }
    }
  }
  assert.ok(count > 3000);
});

test("names that send the bill or the result elsewhere are no fields, and no part of an example", () => {
  const names = ["callbackUrl", "CALLBACK_URL", "webhook", "Web-Hook-Url", "projectid", "projectId", "\uff50rojectid"];
  const items = names.map((id) => ({ ...ITEM, id }));
  const examples = [Object.fromEntries(names.map((name) => [name, "x"]))];
  const groups = groupsOf({ groups: [{ items }] });
  assert.deepEqual(groups, []);
  assert.deepEqual(examplesOf({ examples }, GROUPS), []);
});

test("a field's kind follows from its type", () => {
  const kinds = [prompt, seed, scale, size, loop, photo, more, any].map((field) => field.kind);
  assert.deepEqual(kinds, ["long", "number", "number", "choice", "flag", "file", "file", "file"]);
  assert.deepEqual([photo, more, any].map((field) => field.addressId), ["photoUrl", "moreUrl", "any"]);
  assert.equal(factsOf(scale), "0 to 10 · step 1 · default 6.5");
  assert.equal(factsOf(more), "0 to 10 · step 1 · several files · default x");
});

// --- the JSON -----------------------------------------------------------------------------------

const TEXTS = [
  "{}", "", "  ", '{"a":1}', '{ "a" : 1 , "b" : [1, {"c": "}"}] }', '{"a": "\\"}", "b": {}}',
  '{\n  "prompt": "",\n  "x": 12345678901234567890\n}', '{"\\u0061": 1, "b": 2}', '{"": 0, "a": null}',
  '{"a": 1, "a": 2}', '{"__proto__": 1, "constructor": 2}', '{"b": -1.50e+10, "c": true, "d": [[], {}]}',
  '\t{"a": "\\\\", "b": "x"}\n',
];
const NO_JSON = ["{", "[1]", "x", "null", '"a"', "{a: 1}", '{"a": NaN}', "{} {}", "7", "x".repeat(300_000), "[".repeat(9999)];

test("a member is set, read and dropped, and all others stay as they were written", () => {
  for (const json of TEXTS) {
    const before = JSON.parse(json.trim() || "{}");
    for (const key of ["a", "b", "prompt", "__proto__", "new \"name\"", ""]) {
      const set = setMember(json, key, '{"deep": ["]}", 1]}');
      const expected = Object.fromEntries(Object.entries(before).filter(([name]) => name !== key));
      const after = JSON.parse(set);
      assert.deepEqual(Object.getOwnPropertyDescriptor(after, key).value, { deep: ["]}", 1] }, json);
      const rest = Object.entries(after).filter(([name]) => name !== key);
      assert.deepEqual(Object.fromEntries(rest), expected, json);
      const dropped = dropMember(set, key);
      assert.deepEqual(JSON.parse(dropped), JSON.parse(JSON.stringify(expected)), json);
      for (const member of membersOf(json).members.filter((one) => one.key !== key)) {
        assert.ok(set.includes(json.slice(member.from, member.end)), "as it was written");
      }
    }
    assert.equal(setMember(setMember(json, "z", "1"), "z", "1"), setMember(json, "z", "1"));
  }
  assert.equal(setMember('{\n  "a": 1\n}', "b", "2"), '{\n  "a": 1,\n  "b": 2\n}');
  assert.match(setMember(TEXTS[6], "prompt", '"y"'), /12345678901234567890/);
});

test("what is no JSON object stays what it is, with a sentence", () => {
  for (const json of NO_JSON) {
    assert.equal(membersOf(json).members, null, json.slice(0, 20));
    assert.ok(membersOf(json).problem.length > 5 && membersOf(json).problem.length < 300);
    assert.equal(setMember(json, "a", "1"), json);
    assert.equal(dropMember(json, "a"), json);
    for (const field of fieldsOf(GROUPS)) {
      assert.equal(typeInto(json, field, "1").json, json);
      assert.equal(shownIn(json, field).isGiven, false);
    }
    assert.deepEqual(unknownKeys(json, GROUPS), []);
  }
});

test("what is typed comes back from the JSON", () => {
  const typed = [
    [prompt, ["a fox", "", "  ", 'a "b" \\ \n c', "\u732b \ud83d\ude00", "12", "null", "{"]],
    [seed, ["0", "7", "-3", "12345678901234567890", "0.25", "1e5"]],
    [scale, ["0", "10", "2.5"]],
    [size, ["v", "another"]],
    [loop, ["true", "false"]],
    [photo, ["a.example/x"]],
    [more, ["a.example/x,b.example/y"]],
    [any, ["a.example/x\nb.example/y"]],
  ];
  for (const [field, texts] of typed) {
    for (const text of texts) {
      const { json, problem } = typeInto('{"keep": 1.0}', field, text);
      assert.equal(shownIn(json, field).text, text, `${field.id} ${JSON.stringify(text)}`);
      assert.equal(problem !== "", field === prompt && !text.trim());
      assert.match(json, /"keep": 1\.0/);
      assert.equal(resetField(json, field), '{"keep": 1.0}');
    }
  }
});

test("numbers are what people write, and nothing else is one", () => {
  for (const [text, literal] of [["0,5", "0.5"], [" 3 ", "3"], ["+3", "3"], [".5", "0.5"], ["-.5", "-0.5"], ["5.", "5"], ["007", "7"], ["00", "0"]]) {
    assert.equal(typeInto("{}", seed, text).json, `{\n  "seed": ${literal}\n}`, text);
  }
  for (const text of ["x", "1x", "0x10", "1e999", "NaN", "Infinity", "--1", "1 2", "1,2,3", "\uff11", "1_0", "-"]) {
    assert.deepEqual(typeInto('{"seed": 4}', seed, text), { json: '{"seed": 4}', problem: "This is not a number." }, text);
  }
  assert.equal(typeInto("{}", scale, "11").problem, "The model takes 0 to 10.");
  assert.equal(typeInto('{"seed": 4}', seed, " ").json, "{}", "nothing: the model's default");
});

test("what the form cannot show is left to the JSON", () => {
  for (const value of ['{"x": 1}', "[1]", "[[]]"]) {
    assert.deepEqual(shownIn(`{"prompt": ${value}}`, prompt), { text: value, isGiven: true, isOdd: true });
  }
  assert.equal(shownIn('{"more": ["a", "b"]}', more).text, "a\nb");
  assert.equal(shownIn('{"photo": "a"}', photo).text, "a", "an address in the parameter itself");
  assert.equal(JSON.parse(typeInto('{"photo": "a"}', photo, "b").json).photo, "b");
  assert.equal(typeInto('{"photoUrl": "a", "photo": ""}', photo, "").json, '{"photo": ""}');
});

test("names of another model are named", () => {
  const json = '{"prompt": "", "photoUrl": "", "steps": 1, "sizeUrl": 2, "__proto__": 3}';
  assert.deepEqual(unknownKeys(json, GROUPS), ["steps", "sizeUrl", "__proto__"]);
  assert.deepEqual(JSON.parse(unknownKeys(json, GROUPS).reduce(dropMember, json)), { prompt: "", photoUrl: "" });
});

// --- examples -----------------------------------------------------------------------------------

test("an example gives its values, and its files only if asked", () => {
  const [fox, link] = examplesOf(MODEL, GROUPS);
  assert.equal(examplesOf(MODEL, GROUPS).length, 2, "the one that sends things elsewhere is none");
  const before = '{"prompt": "old", "keep": 1}';
  assert.deepEqual(JSON.parse(applyExample(before, fox, false)), { prompt: "a fox", keep: 1, seed: 3, size: "v" });
  assert.deepEqual(Object.keys(JSON.parse(applyExample(before, fox, true))).sort(), [
    "keep", "photo", "photoUrl", "prompt", "seed", "size",
  ]);
  assert.equal(applyExample(before, link, false), before, "a text with an address counts as one");
  assert.equal(fox.line, "a fox");
  assert.deepEqual(JSON.parse(applyExample("no json", fox, false)), { prompt: "a fox", seed: 3, size: "v" });
});

// --- sockets and links --------------------------------------------------------------------------

test("which socket feeds which parameter is one line of text", () => {
  assert.equal(setPlace("", "image_2", "last"), "image_2=last");
  assert.equal(setPlace("image_2=a;video = b", "image_2", "c"), "video=b, image_2=c");
  assert.equal(setPlace("image_2=a, odd, video=b", "video", ""), "image_2=a, odd");
  assert.equal(placeOf(" image_2 = a \n video=b=c", "video"), "b=c");
  assert.equal(placeOf("image_2=a", "image"), "");
  for (const nonsense of NONSENSE) assert.equal(typeof setPlace(nonsense, "audio", "x"), "string");
  assert.deepEqual(socketsFor(photo), ["image", "image_2", "image_3", "image_4"]);
  assert.equal(socketsFor(any).length, 6);
  assert.deepEqual(socketsFor(prompt), []);
});

test("only a page of the service is linked", () => {
  assert.ok(isWiroPage("https://wiro.ai/models/a/b"));
  for (const address of [
    "http://wiro.ai/x", "javascript:alert(1)//wiro.ai", "https://wiro.ai.evil.example", "//wiro.ai/x",
    "https://evil.example/wiro.ai", "https://a@wiro.ai/", "ftps://x.example", "data:text/html,x", ...NONSENSE,
  ]) {
    assert.equal(isWiroPage(address), false);
  }
});

test("texts have an end", () => {
  assert.equal(shorten("a  b\n c"), "a b c");
  assert.equal(shorten("x".repeat(500)).length, 121);
});
