// Joins the page's elements to the player.

import { Connection } from "./connection.js";
import { decodableFormats } from "./decoding.js";
import { saveFile, sharedWalk } from "./files.js";
import { Hud } from "./hud.js";
import { Input } from "./input.js";
import { Player } from "./player.js";
import { ShareDialog } from "./sharing.js";
import { Skeleton } from "./skeleton.js";
import { Stage } from "./stage.js";
import { read, write } from "./storage.js";
import { Timeline } from "./timeline.js";
import { View } from "./view.js";
import { randomSeed, WorldDialog } from "./world.js";

const HUD_MS = 250;
const PAD_BUTTONS = { 0: "play", 1: "back", 3: "split", 9: "play" }; // of a standard gamepad
const COLOURS = ["system", "dark", "light"];
const STAGE_LABELS = {
  camera: "The world. W, A, S, D or the arrow keys move. Press the question mark for all keys.",
  pose: "The world. Tab goes to the joints of the figure, and the arrow keys move one. "
    + "Press the question mark for all keys.",
  prompt: "The world. P goes to its prompt. Press the question mark for all keys.",
};
let colours = "system";

const $ = (id) => document.getElementById(id);
const secure = location.protocol === "https:" ? "wss:" : "ws:";
const address = new URL(`ws${location.search}`, location.href);
address.protocol = secure;

const connection = new Connection(address, await decodableFormats());
const stage = new Stage([$("lane0"), $("lane1")], () => {});
let brokenLink = false;
const walk = await sharedWalk().catch(() => {
  brokenLink = true;
  return null;
});
const player = new Player(connection, stage, { walk });
const view = new View(player);
const hud = new Hud($("hud"), $("keys"), $("receipt"), player.receipts);
const timeline = new Timeline($("timeline"), $("thumb"), player.branches, {
  onScrub: (branch, step, done) => player.scrub(branch, step, done),
  preview: (branch, step) => player.memory.last(player.branches.owner(branch, step), step),
});
const worlds = new WorldDialog($("world"), {
  onStart: (choice) => player.open(choice),
  onWalk: (file) => player.openWalk(file),
  upload: (file) => connection.upload(file),
});
const sharing = new ShareDialog($("sharing"));
const input = new Input($("stage"), $("stick"), {
  onChange: (control) => {
    hud.held(input.heldKeys);
    player.steer(control);
    if (control.key) view.dropHint();
  },
  onButton: (index) => actions[PAD_BUTTONS[index]]?.(),
});

const skeletons = [0, 1].map((lane) => new Skeleton($(`figure${lane}`), (moved) => {
  player.pose({ lane, ...moved });
  view.dropHint();
}));

const actions = {
  play: () => (player.playing ? player.pause() : player.play()),
  back: () => player.rewind(Math.max(1, Math.round(1 / player.stepSeconds))),
  reset: (event) => player.reset(event?.shiftKey ? randomSeed() : player.seed),
  previous: () => timeline.stepBranch(-1),
  next: () => timeline.stepBranch(1),
  live: () => player.scrub(player.future, player.branches.get(player.future)?.to_step ?? 0, true),
  replay: () => player.follow(),
  split: () => (player.split ? player.endSplit(0) : player.startSplit()),
  keep0: () => player.endSplit(0),
  keep1: () => player.endSplit(1),
  redo: () => player.setRedo(!player.redo),
  record,
  share: async () => sharing.open(await player.backup.fetchLog()),
  new: () => worlds.open(player.prompt, player.seed),
  help: () => $("keyhelp").showModal(),
  figures: () => showFigures($("hud").hidden),
  full: () => (document.fullscreenElement
    ? document.exitFullscreen() : $("stage").requestFullscreen?.()),
  theme: () => colour(COLOURS[(COLOURS.indexOf(colours) + 1) % COLOURS.length]),
};

const SHORTCUTS = {
  " ": "play", z: "back", r: "reset", "[": "previous", "]": "next", x: "split", g: "record",
  n: "new", "?": "help", h: "figures", f: "full",
};

for (const name of Object.keys(actions)) {
  $(name)?.addEventListener("click", (event) => {
    actions[name](event);
    // Keys pressed next are for the world, unless the control was reached by keyboard.
    if (event.detail && !document.querySelector("dialog[open]")) $("stage").focus();
  });
}

addEventListener("keydown", (event) => {
  // Keys that steer go by their place; on some keyboards they have the letters of shortcuts.
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, textarea, select, dialog")) return;
  if (event.key === " " && event.target.closest("button, a, label")) return;
  if (event.key.toLowerCase() === "p") {
    event.preventDefault();
    $("prompt").select();
    return;
  }
  const name = event.code === "KeyZ" ? "back" : SHORTCUTS[event.key.toLowerCase()];
  if (!name || (event.repeat && name !== "back")) return;
  event.preventDefault();
  actions[name](event);
});

$("full").hidden = !document.fullscreenEnabled; // as on phones

// A hidden page pauses, and goes on when it is seen again.
let goOn = null;
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    goOn = player.following ? () => player.follow() : player.playing ? () => player.play() : null;
    player.pause();
  } else {
    goOn?.();
  }
});

// The prompt.

const field = $("prompt");
const isNew = () => field.value.trim() && field.value.trim() !== player.prompt;
field.addEventListener("input", () => { $("apply").disabled = !isNew(); });
field.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  showPrompt(player.prompt);
  $("stage").focus();
});
$("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (isNew()) usePrompt(field.value.trim());
  $("stage").focus();
});

function usePrompt(text) {
  player.changePrompt(text);
  showPrompt(text);
}

function showPrompt(text) {
  field.value = text;
  $("apply").disabled = true;
  for (const chip of $("themes").children) {
    chip.setAttribute("aria-pressed", chip.textContent === text);
  }
}

function fillThemes(prompts) {
  $("themes").replaceChildren(...prompts.map((text) => {
    const chip = Object.assign(document.createElement("button"), {
      type: "button", className: "chip", textContent: text,
    });
    chip.addEventListener("click", (event) => {
      usePrompt(text);
      if (event.detail) $("stage").focus();
    });
    return chip;
  }));
}

// Recording.

async function record() {
  if (!player.live) return;
  if (!player.recording) {
    player.startRecording();
    return;
  }
  const steps = player.stopRecording();
  if (!steps) {
    view.say("record: expected steps played since the start, got none; play on before you save");
    return;
  }
  view.say("Making the video from the walk's log");
  try {
    const { branch, from, to } = steps;
    saveFile(await player.fetchRecording(steps), "video/mp4", `aapt-${branch}-${from}-${to}.mp4`);
    view.say("Saved.");
  } catch (error) {
    view.say(error.message);
  }
}

// The figure of a model that follows poses.

function fillMotions(motions) {
  $("motions").replaceChildren(...["", ...motions].map((name) => {
    const chip = Object.assign(document.createElement("button"), {
      type: "button", className: "chip", value: name, textContent: name || "Hold",
    });
    chip.addEventListener("click", (event) => {
      player.move(name || null, event.timeStamp);
      view.dropHint();
      if (event.detail) $("stage").focus();
    });
    return chip;
  }));
}

function placeFigure(place) {
  write("localStorage", "figure", place);
  $("figure-place").value = place;
  $("stage").dataset.figure = place;
  for (const { svg } of skeletons) {
    svg.toggleAttribute("hidden", !player.controls.posed || place === "hidden");
  }
}
$("figure-place").addEventListener("change", ({ target }) => placeFigure(target.value));

function showFigure({ figure, driven_by: driver, width, height }) {
  input.moves = !figure;
  $("stage").setAttribute("aria-label", STAGE_LABELS[driver]);
  if (figure) {
    for (const skeleton of skeletons) skeleton.configure(figure, width / height);
    fillMotions(figure.motions);
    if (read("localStorage", "figures") === null) showFigures(false, false); // they hide a raised hand
  }
  placeFigure(read("localStorage", "figure") ?? "over");
}

// Split screen.

for (const lane of [0, 1]) {
  const choice = $(`control${lane}`);
  choice.addEventListener("change", () => {
    player.changeLane(lane, Number(choice.value));
    $("stage").focus();
  });
}

function fillLanes({ lanes, own }) {
  for (const lane of [0, 1]) {
    const names = [own[lane], ...lanes.slice(1).map(([name]) => name)];
    $(`control${lane}`).replaceChildren(...names.map((name, index) => new Option(name, index)));
  }
}

// Settings that stay.

function colour(name) {
  colours = name;
  write("localStorage", "colours", name);
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").setAttribute("aria-label", `Colours: ${name === "system" ? "as the system" : name}`);
  hud.draw(stage.backlog);
}

function showFigures(on, keep = true) {
  if (keep) write("localStorage", "figures", on);
  hud.show(on);
  $("figures").setAttribute("aria-pressed", on);
}

/** Shows the first image under the card while a world opens. */
async function showPoster(address) {
  const answer = await fetch(address);
  const bitmap = await createImageBitmap(await answer.blob());
  if (["opening", "waiting"].includes(player.phase)) stage.preview(0, bitmap);
  bitmap.close();
}

// Events of the player.

player.addEventListener("welcome", ({ detail }) => {
  const { width, height } = detail;
  document.documentElement.style.setProperty("--aspect", width / height);
  timeline.seconds = player.stepSeconds;
  hud.period = 1000 * player.stepSeconds;
  view.welcome(detail);
  fillLanes(player.controls);
  showFigure(detail);
  fillThemes(detail.prompts);
  worlds.fill(detail.gallery);
  if (detail.gallery.length && !detail.resumed && !player.branches.rows.length) {
    showPoster(detail.gallery[0].url);
  }
});
player.addEventListener("prompt", ({ detail }) => showPrompt(detail));
player.addEventListener("pose", ({ detail }) => skeletons[detail.lane].show(detail.pose));
player.addEventListener("control", ({ detail }) => {
  if (player.controls.posed) skeletons[detail.lane].control(detail.control);
});
player.addEventListener("said", ({ detail }) => view.say(detail));
player.addEventListener("obeyed", ({ detail }) => {
  hud.obeyed(detail.presses, detail.frame);
  view.flash(detail.frame.lane);
});
player.addEventListener("change", () => {
  view.update();
  timeline.head = player.head;
  timeline.lanes = player.split?.branches ?? null;
  input.lanes = player.split ? 2 : 1;
  timeline.marks = player.marks;
  timeline.draw();
});
$("world").addEventListener("problem", ({ detail }) => view.say(detail));

colour(read("localStorage", "colours") ?? "system");
const figures = read("localStorage", "figures");
if (figures === null) showFigures(matchMedia("(min-width: 900px)").matches, false);
else showFigures(figures === "true");
setInterval(() => hud.draw(stage.backlog), HUD_MS);
if (brokenLink) {
  view.say("link: expected a whole shared walk, got a part of one; copy the whole link");
}
connection.connect();
$("stage").focus({ preventScroll: true });
