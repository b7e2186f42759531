// Which workflows ask for the picture of the templates. Does not touch the page.

/** Its name in the input folder. */
export const PORTRAIT = "skyreels_portrait.jpg";

/** Whether a Load Image node of a workflow file, or of its subgraphs, names the picture. */
export function asksForPortrait(graph) {
  const parts = [graph, ...(graph?.definitions?.subgraphs ?? [])];
  return parts.some((part) => (Array.isArray(part?.nodes) ? part.nodes : []).some(isAsking));
}

function isAsking(node) {
  const values = node?.widgets_values;
  return node?.type === "LoadImage" && Array.isArray(values) && values[0] === PORTRAIT;
}

/**
 * Add a name to the choices of an input, as [choices, options] or ["COMBO", {options: choices}].
 *
 * False if it is one of them already.
 */
export function offer(input, name) {
  const choices = Array.isArray(input?.[0]) ? input[0] : input?.[1]?.options;
  if (!Array.isArray(choices)) return true; // another front end keeps them elsewhere
  if (choices.includes(name)) return false;
  choices.push(name);
  return true;
}
