// Which picture of which clip is shown when; the page hands in how to open, draw and show them.

/** Pictures shown for each frame of a clip; those between two frames are faded from both. */
export const FADE = 2;
/** A clip that is older, and was followed by two stills, gets no successor: previews have failed. */
const STALE_MS = 3000;

/** How many pictures a clip of `count` frames has, from its first to its last frame. */
export function picturesOf(count) {
  return (count - 1) * FADE + 1;
}

/** What a picture is made of, drawn in this order: [frame, opacity]. */
export function layersOf(picture) {
  const frame = Math.floor(picture / FADE);
  const opacity = (picture % FADE) / FADE;
  return opacity ? [[frame, 1], [frame + 1, opacity]] : [[frame, 1]];
}

/** The top left corner of a frame in the sheet, which has all cells in equal size. */
export function cornerOf(frame, { columns, rows }, sheet) {
  return [
    (frame % columns) * (sheet.width / columns),
    Math.floor(frame / columns) * (sheet.height / rows),
  ];
}

/** Width and height at which a clip is shown: as large as the page's own previews. */
export function sizeOf({ width, height, max_edge: edge }) {
  const scale = edge / Math.max(width, height);
  return [width, height].map((side) => Math.max(1, Math.round(side * scale)));
}

/** The node that an id such as "12:3" stands for: number 3 in the subgraph of number 12. */
export function findNode(graph, id) {
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/**
 * Shows clips on their nodes, until they are stopped; of each node the latest.
 *
 * @param open: (clip) => Promise of the sheet, {width, height, close()}.
 * @param draw: (sheet, clip, picture) => Promise of the picture.
 * @param show: (clip, picture); shows it on the clip's node, in the place of what is there.
 * @param isThere: (clip) => whether the page has its node.
 * @param complain: (error).
 * @param clock: {now, setInterval, clearInterval}, `now` in milliseconds.
 */
export function createPlayer({ open, draw, show, isThere, complain, clock }) {
  const latest = new Map(); // node -> the clip that came last, perhaps not yet open
  const playing = new Map(); // node -> {clip, sheet, startedAt, openedAt, stills, pictures, at, shown}
  let timer = null;

  async function add(clip) {
    latest.set(clip.node, clip);
    const sheet = await open(clip);
    if (latest.get(clip.node) !== clip) {
      sheet.close();
      return;
    }
    const before = playing.get(clip.node);
    before?.sheet.close();
    const now = clock.now();
    const isAlike = before?.clip.count === clip.count; // then the motion goes on where it is
    playing.set(clip.node, {
      clip, sheet, startedAt: isAlike ? before.startedAt : now, openedAt: now, stills: 0,
      pictures: [], at: -1, shown: before?.shown ?? null,
    });
    timer ??= clock.setInterval(tick, 1000 / (clip.fps * FADE));
    tick();
  }

  function tick() {
    for (const player of playing.values()) {
      const { clip, sheet, startedAt, pictures } = player;
      if (!isThere(clip)) {
        drop(clip.node);
        continue;
      }
      const passed = Math.floor(((clock.now() - startedAt) / 1000) * clip.fps * FADE);
      const at = passed % picturesOf(clip.count);
      if (at === player.at) continue;
      player.at = at;
      pictures[at] ??= draw(sheet, clip, at);
      pictures[at].then((picture) => showIfDue(player, at, picture)).catch(fail);
    }
  }

  function showIfDue(player, at, picture) {
    if (playing.get(player.clip.node) !== player || player.at !== at) return;
    player.shown = picture;
    show(player.clip, picture);
  }

  /** The page has just shown a still of its own on a node: the clip takes its place again. */
  function onStill(node) {
    const player = playing.get(node);
    if (!player) return;
    if (player.stills && clock.now() - player.openedAt > STALE_MS) {
      drop(node);
      return;
    }
    player.stills += 1;
    if (player.shown && isThere(player.clip)) show(player.clip, player.shown);
  }

  function drop(node) {
    latest.delete(node);
    playing.get(node)?.sheet.close();
    playing.delete(node);
    if (playing.size || timer === null) return;
    clock.clearInterval(timer);
    timer = null;
  }

  /** End all clips but that of one node, which keep the picture that they show. */
  function stop(except = null) {
    for (const node of [...latest.keys()]) if (node !== except) drop(node);
  }

  function fail(error) {
    stop();
    complain(error);
  }

  return { add: (clip) => add(clip).catch(fail), onStill, stop };
}
