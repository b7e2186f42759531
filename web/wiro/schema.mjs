// A model's parameters as form fields, and their values as JSON. Does not touch the page.
//
// A model's record is untrusted: nothing in it may make this throw, and all lengths are bounded. The
// JSON is edited member by member as text, so that what the form does not know (other names, numbers
// beyond a double's precision, whitespace) stays as it was written.

import { t } from "./language.mjs";

const LINE_LENGTH = 200;
const TEXT_LENGTH = 2000;
const MAX_FIELDS = 500;
const MAX_OPTIONS = 2000;
const MAX_EXAMPLES = 12;
const MAX_JSON = 200000;
const NUMBER_TYPES = ["range", "number", "float", "integer", "int"];
const FLAG_TYPES = ["checkbox", "boolean", "bool", "toggle", "switch"];
// names that redirect the bill or the result: the server refuses them
const REDIRECTING = /^(callback|webhook|projectid)/;
const NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/;

export const SOCKETS = ["image", "image_2", "image_3", "image_4", "video", "audio"];

// --- fields -------------------------------------------------------------------------------------

/** [{title, fields}] of the server's description of a model. */
export function groupsOf(model) {
  const seen = new Set();
  const groups = [];
  for (const group of listOf(model?.groups).slice(0, MAX_FIELDS)) {
    const fields = [];
    for (const item of listOf(group?.items)) {
      const field = seen.size < MAX_FIELDS ? fieldOf(item) : null;
      if (!field || seen.has(field.id)) continue;
      seen.add(field.id);
      fields.push(field);
    }
    if (fields.length) groups.push({ title: line(group.title), fields });
  }
  return groups;
}

function fieldOf(item) {
  const id = typeof item?.id === "string" ? item.id : "";
  if (!id || id.length > LINE_LENGTH || isRedirecting(id)) return null;
  const type = line(item.type).toLowerCase();
  const options = listOf(item.options)
    .filter((option) => typeof option?.value === "string" && option.value.length <= TEXT_LENGTH)
    .slice(0, MAX_OPTIONS)
    .map(({ value, label }) => ({ value, label: line(label) || value }));
  const [low, high] = [number(item.min), number(item.max)];
  const hasRange = low !== null && high !== null && low < high;
  const files = isObject(item.files) ? item.files : null;
  return {
    id,
    kind: kindOfField(type, options, files),
    label: line(item.label) || id,
    help: text(item.help, TEXT_LENGTH),
    placeholder: line(item.placeholder),
    isRequired: item.is_required === true,
    isAdvanced: item.is_advanced === true,
    initial: plain(item.default),
    options,
    low: hasRange ? low : null,
    high: hasRange ? high : null,
    step: number(item.step) > 0 ? number(item.step) : null,
    fileKind: files && ["image", "video", "audio"].includes(files.kind) ? files.kind : "",
    takesMany: files?.takes_many === true,
    // the parameter for a URL: next to the file's, or the same if it takes files and URLs
    addressId: type === "combinefileinput" ? id : `${id}Url`,
  };
}

function kindOfField(type, options, files) {
  if (files) return "file";
  if (NUMBER_TYPES.includes(type)) return "number";
  if (options.length) return "choice";
  if (FLAG_TYPES.includes(type)) return "flag";
  return type === "textarea" ? "long" : "text";
}

/** One line: what values are allowed. */
export function factsOf(field) {
  const facts = [];
  if (field.low !== null) facts.push(t("{low} to {high}", { low: field.low, high: field.high }));
  if (field.step !== null) facts.push(t("step {step}", { step: field.step }));
  if (field.kind === "file") facts.push(field.takesMany ? t("several files") : t("one file"));
  if (field.initial !== "" && field.kind !== "choice") {
    facts.push(t("default {value}", { value: shorten(field.initial) }));
  }
  return facts.join(" · ");
}

// --- the JSON -----------------------------------------------------------------------------------

/** {members, problem} of a JSON object's text; members are {key, from, start, end}, or null. */
export function membersOf(json) {
  const source = typeof json === "string" ? json : "";
  if (source.length > MAX_JSON) return { members: null, problem: t("The JSON is too long to edit here.") };
  if (!source.trim()) return { members: [], problem: "" };
  let value;
  try {
    value = JSON.parse(source);
  } catch (error) {
    return { members: null, problem: t("This is not valid JSON ({reason}).", { reason: line(error.message) }) };
  }
  if (!isObject(value)) return { members: null, problem: t("Write a JSON object: {example}.", { example: '{"name": value}' }) };
  return { members: scan(source), problem: "" };
}

// only for a text that JSON.parse parses as an object
function scan(source) {
  const members = [];
  let at = source.indexOf("{") + 1;
  const skip = (pattern) => {
    pattern.lastIndex = at;
    at += pattern.exec(source)?.[0].length ?? 0;
  };
  for (;;) {
    skip(/[\s,]*/y);
    if (source[at] === "}") return members;
    const from = at;
    at = endOfString(source, at);
    const key = JSON.parse(source.slice(from, at));
    skip(/\s*:\s*/y);
    const start = at;
    at = endOfValue(source, at);
    members.push({ key, from, start, end: at });
  }
}

function endOfString(source, at) {
  for (at += 1; source[at] !== '"'; at += 1) if (source[at] === "\\") at += 1;
  return at + 1;
}

function endOfValue(source, at) {
  let depth = 0;
  while (at < source.length) {
    const letter = source[at];
    if (letter === '"') {
      at = endOfString(source, at);
      if (!depth) return at;
      continue;
    }
    if (!depth && /[\s,}\]]/.test(letter)) return at;
    if (letter === "{" || letter === "[") depth += 1;
    if (letter === "}" || letter === "]") depth -= 1;
    at += 1;
    if (!depth && (letter === "}" || letter === "]")) return at;
  }
  return at;
}

function memberOf(json, key) {
  // of a repeated name the last one counts
  return membersOf(json).members?.findLast((member) => member.key === key);
}

/** The text with one member set to a JSON value; unchanged if it is not valid JSON. */
export function setMember(json, key, literal) {
  const { members } = membersOf(json);
  if (!members) return json;
  const name = JSON.stringify(key);
  if (!members.length) return `{\n  ${name}: ${literal}\n}`;
  const found = memberOf(json, key);
  if (found) return json.slice(0, found.start) + literal + json.slice(found.end);
  const last = members.at(-1);
  const blank = /\s*$/.exec(json.slice(0, last.from))[0];
  return `${json.slice(0, last.end)},${blank}${name}: ${literal}${json.slice(last.end)}`;
}

/** The text with a member removed. */
export function dropMember(json, key) {
  let source = json;
  for (let found = memberOf(source, key); found; found = memberOf(source, key)) {
    const { members } = membersOf(source);
    const at = members.findIndex((member) => member.from === found.from);
    const [before, next] = [members[at - 1], members[at + 1]];
    if (before) source = source.slice(0, before.end) + source.slice(found.end);
    else if (next) source = source.slice(0, found.from) + source.slice(next.from);
    else source = "{}";
  }
  return source;
}

/** Names in the JSON that belong to no field. */
export function unknownKeys(json, groups) {
  const known = new Set();
  for (const field of fieldsOf(groups)) {
    known.add(field.id);
    if (field.kind === "file") known.add(field.addressId);
  }
  const keys = (membersOf(json).members ?? []).map((member) => member.key);
  return [...new Set(keys)].filter((key) => !known.has(key));
}

export function fieldsOf(groups) {
  return groups.flatMap((group) => group.fields);
}

// --- a field and its member ---------------------------------------------------------------------

/** {text, isGiven, isOdd}: what a field shows. isOdd: it can be edited in the JSON only. */
export function shownIn(json, field) {
  const key = keyOf(json, field);
  const member = memberOf(json, key);
  if (!member) return { text: "", isGiven: false, isOdd: false };
  const raw = json.slice(member.start, member.end);
  const value = JSON.parse(raw);
  const shown = (found) => ({ text: found, isGiven: true, isOdd: false });
  if (value === null) return shown("");
  if (typeof value === "string") return shown(value);
  if (typeof value === "number") return shown(raw); // as written, with all digits
  if (typeof value === "boolean") return shown(String(value));
  const isList = Array.isArray(value) && value.every((one) => typeof one === "string");
  if (field.kind === "file" && isList) return shown(value.join("\n"));
  return { text: raw, isGiven: true, isOdd: true };
}

function keyOf(json, field) {
  if (field.kind !== "file") return field.id;
  return memberOf(json, field.addressId) || !memberOf(json, field.id) ? field.addressId : field.id;
}

/**
 * {json, problem}: the JSON after typing into a field, and what is wrong with the value.
 *
 * What is not a value at all (letters for a number) is not written.
 */
export function typeInto(json, field, typed) {
  const key = keyOf(json, field);
  const given = text(typed, MAX_JSON);
  if (field.kind === "file") return { json: setUrls(json, field, key, given), problem: "" };
  if (field.kind === "number" || field.kind === "flag") return typeLiteral(json, field, given.trim());
  if (field.kind === "choice" && given === "") return { json: dropMember(json, key), problem: "" };
  const problem = field.isRequired && !given.trim() ? t("It must not be empty.") : "";
  return { json: setMember(json, key, JSON.stringify(given)), problem };
}

function typeLiteral(json, field, given) {
  if (!given) return { json: dropMember(json, field.id), problem: "" };
  if (field.kind === "flag") {
    const literal = given === "true" ? "true" : "false";
    return { json: setMember(json, field.id, literal), problem: "" };
  }
  const literal = given.replace(",", ".").replace(/^\+/, "").replace(/^(-?)\./, "$10.")
    .replace(/\.$/, "").replace(/^(-?)0+(?=\d)/, "$1");
  if (!NUMBER.test(literal) || !Number.isFinite(Number(literal))) {
    return { json, problem: t("This is not a number.") };
  }
  return { json: setMember(json, field.id, literal), problem: rangeProblem(field, literal) };
}

function rangeProblem(field, literal) {
  if (field.low === null || (field.low <= Number(literal) && Number(literal) <= field.high)) return "";
  return t("The model takes {low} to {high}.", { low: field.low, high: field.high });
}

function setUrls(json, field, key, given) {
  const addresses = given.split(/[\s,]+/).filter(Boolean);
  if (!addresses.length) return dropMember(dropMember(json, field.addressId), key);
  const isList = field.addressId === field.id;
  return setMember(json, key, JSON.stringify(isList ? addresses : addresses.join(",")));
}

/** The JSON with a field's value removed: the model's default applies again. */
export function resetField(json, field) {
  return dropMember(field.kind === "file" ? dropMember(json, field.addressId) : json, field.id);
}

// --- examples -----------------------------------------------------------------------------------

/**
 * [{entries, addresses, line}] of a model's examples: [name, JSON] pairs with values, and pairs with
 * URLs of somebody's files, which are applied only on request.
 */
export function examplesOf(model, groups) {
  const fields = fieldsOf(groups);
  const examples = [];
  for (const example of listOf(model?.examples).slice(0, MAX_EXAMPLES)) {
    const [entries, addresses] = [[], []];
    for (const [key, value] of isObject(example) ? Object.entries(example) : []) {
      const field = fields.find((one) => one.id === key || (one.kind === "file" && one.addressId === key));
      if (!field || isRedirecting(key) || !isPlain(value)) continue;
      const isFile = field.kind === "file" || hasUrl(value);
      (isFile ? addresses : entries).push([key, JSON.stringify(value)]);
    }
    if (entries.length || addresses.length) examples.push({ entries, addresses, line: lineOf(entries, addresses) });
  }
  return examples;
}

function lineOf(entries, addresses) {
  const texts = entries.map(([, literal]) => JSON.parse(literal)).filter((one) => typeof one === "string");
  const longest = texts.reduce((best, one) => (one.length > best.length ? one : best), "");
  return shorten(longest) || [...entries, ...addresses].map(([key]) => key).join(", ").slice(0, LINE_LENGTH);
}

export function applyExample(json, example, withUrls) {
  let source = membersOf(json).members ? json : "{}";
  const pairs = withUrls ? [...example.entries, ...example.addresses] : example.entries;
  for (const [key, literal] of pairs) source = setMember(source, key, literal);
  return source;
}

function hasUrl(value) {
  const texts = Array.isArray(value) ? value : [value];
  return texts.some((one) => typeof one === "string" && /:\/\/|^\s*(\/\/|data:|www\.)/i.test(one));
}

// --- which socket feeds which parameter ----------------------------------------------------------

/** [[socket, parameter]] of "image_2=lastImage, video=inputVideo"; anything else is ["", text]. */
function placesOf(line) {
  return text(line, MAX_JSON).split(/[,;\n]/).map((part) => part.trim()).filter(Boolean).map((part) => {
    const at = part.indexOf("=");
    const socket = part.slice(0, Math.max(at, 0)).trim();
    return SOCKETS.includes(socket) ? [socket, part.slice(at + 1).trim()] : ["", part];
  });
}

/** The parameter assigned to a socket, or "". */
export function placeOf(places, socket) {
  return placesOf(places).find(([one]) => one === socket)?.[1] ?? "";
}

/** The text with a socket assigned to another parameter; "" removes it. */
export function setPlace(places, socket, name) {
  const rest = placesOf(places).filter(([one]) => one !== socket);
  const all = name ? [...rest, [socket, name]] : rest;
  return all.map(([one, other]) => (one ? `${one}=${other}` : other)).join(", ");
}

/** The sockets that can feed a field. */
export function socketsFor(field) {
  if (field.kind !== "file") return [];
  if (!field.fileKind) return SOCKETS;
  return SOCKETS.filter((socket) => socket.startsWith(field.fileKind));
}

// --- small --------------------------------------------------------------------------------------

/** Whether a URL is an encrypted page of wiro.ai. */
export function isWiroPage(address) {
  try {
    const { host, protocol, username } = new URL(address);
    return host === "wiro.ai" && !username && protocol.endsWith("s:") && protocol.length === 6;
  } catch {
    return false;
  }
}

export function shorten(value, length = 120) {
  const whole = text(value, 10 * TEXT_LENGTH).replace(/\s+/g, " ").trim();
  return whole.length > length ? `${whole.slice(0, length)}…` : whole;
}

function isRedirecting(name) {
  return REDIRECTING.test(name.normalize("NFKC").toLowerCase().replace(/[^a-z0-9]/g, ""));
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function listOf(value) {
  return Array.isArray(value) ? value : [];
}

function text(value, length) {
  return ["string", "number"].includes(typeof value) ? String(value).slice(0, length) : "";
}

export function line(value) {
  return text(value, 2 * LINE_LENGTH).replace(/\s+/g, " ").trim().slice(0, LINE_LENGTH);
}

function number(value) {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}

function plain(value) {
  if (typeof value === "boolean") return String(value);
  return text(value, TEXT_LENGTH);
}

function isPlain(value) {
  const isText = (one) => typeof one === "string" && one.length <= 2 * TEXT_LENGTH;
  if (Array.isArray(value)) return value.length > 0 && value.length <= 20 && value.every(isText);
  return isText(value) || typeof value === "boolean" || number(value) !== null;
}
