// Shows the player's state: the status, the card over the image, buttons, the past.

import { clock, COLOURS } from "./timeline.js";

const TOAST_MS = 4200;
const HINT_MS = 400;
const SHORT_MS = 1000; // a replay that takes less is not announced

const STATUS = {
  connecting: "Connecting",
  opening: "Opening",
  waiting: "In line",
  ready: "Ready",
  playing: "Live",
  paused: "Paused",
  lost: "Connection lost",
  ended: "Ended",
  failed: "Stopped",
};

const ENDED = {
  idle: ["The world went to sleep", "Nobody played for a while, so its place was given away. It can be rebuilt from your keys."],
  moved: ["Played elsewhere", "This world continues in another tab or on another device."],
  limit: ["The end of the world", "A world has a last step, and this one has reached it."],
  failed: ["The world broke", "A step failed, and the server has closed the world."],
};

const BUTTONS = { idle: "Wake it", moved: "Start another" };

const $ = (id) => document.getElementById(id);

export class View {
  #hinted = false;

  constructor(player) {
    this.player = player;
    $("card-button").addEventListener("click", () => player.again());
    setInterval(() => { if (this.player.phase === "lost") this.#showCard(); }, 250);
  }

  welcome({ model, width, height, version, driven_by: drivenBy }) {
    document.body.dataset.drivenBy = drivenBy;
    $("insecure").hidden = isSecureContext;
    $("model").textContent = `${model} · ${width}×${height}`;
    $("model").title = `aapt ${version}`;
  }

  update() {
    const { player } = this;
    const { phase } = player;
    document.body.dataset.state = phase;
    const replaying = `Replaying your ${player.controls.posed ? "poses" : "keys"}`;
    const status = phase === "playing" && player.following ? replaying : STATUS[phase];
    setText($("status"), status);
    const end = player.head.step + Math.max(0, player.stepsLeft);
    setText($("clock").firstElementChild, clock(player.head.step * player.stepSeconds));
    setText($("clock").lastElementChild, clock(end * player.stepSeconds));
    Object.assign($("stage").dataset, player.head);
    this.#showButtons();
    this.#showSplit();
    this.#showMotion();
    this.#showPast();
    this.#showCard();
    $("hint").hidden = phase !== "ready" || this.#hinted;
  }

  /** Takes the hint away: the player has found the keys. */
  dropHint() {
    if (this.#hinted || !this.player.live) return;
    this.#hinted = true;
    $("hint").classList.add("leaving");
    setTimeout(() => { $("hint").hidden = true; }, HINT_MS);
  }

  /** Shows a line for a few seconds. */
  say(text) {
    const toast = Object.assign(document.createElement("p"), { textContent: text });
    $("toasts").append(toast);
    while ($("toasts").children.length > 3) $("toasts").firstElementChild.remove();
    setTimeout(() => toast.remove(), TOAST_MS + 30 * text.length);
  }

  /** Marks the frame that first obeyed a key, on the image itself. */
  flash(lane) {
    const frame = $(`lane${lane}`).parentElement;
    frame.classList.remove("obeyed");
    frame.getBoundingClientRect(); // so that the animation starts again
    frame.classList.add("obeyed");
  }

  #showButtons() {
    const { player } = this;
    const play = $("play");
    const label = player.playing ? "Pause" : "Play";
    if (play.getAttribute("aria-label") !== label) {
      play.setAttribute("aria-label", label);
      play.querySelector("use").setAttribute("href", player.playing ? "#i-pause" : "#i-play");
    }
    for (const id of ["play", "back", "reset", "split", "record", "share", "redo"]) {
      $(id).disabled = !player.live;
    }
    $("back").disabled ||= player.head.step === 0;
    $("redo").setAttribute("aria-checked", player.redo);
    $("record").setAttribute("aria-pressed", Boolean(player.recording));
    $("record").querySelector("span").textContent = player.recording ? "Save" : "Record";
    $("recording").hidden = !player.recording;
    if (player.recording) {
      const steps = Math.max(0, player.head.step - player.recording.from);
      setText($("recorded"), clock(steps * player.stepSeconds));
    }
  }

  #showSplit() {
    const { player } = this, { split } = player;
    $("second").hidden = !split;
    $("tag0").hidden = !split;
    $("split-bar").hidden = !split;
    $("split").setAttribute("aria-pressed", Boolean(split));
    $("stage").classList.toggle("two", Boolean(split));
    if (!split) return;
    for (const lane of [0, 1]) {
      const choice = $(`control${lane}`);
      if (document.activeElement !== choice) choice.value = split.controls[lane];
      const tag = $(`tag${lane}`), colour = `c${(split.branches?.[lane] ?? lane) % COLOURS}`;
      const index = split.controls[lane];
      const { lanes, own } = player.controls;
      setText(tag, `${"AB"[lane]}  ${index ? lanes[index][0] : own[lane]}`);
      tag.className = `tag ${colour}`;
      $(`swatch${lane}`).className = `swatch ${colour}`;
    }
  }

  #showMotion() {
    const { player } = this;
    $("motion-bar").hidden = !player.controls.posed;
    $("motions").hidden = Boolean(player.split);
    for (const chip of $("motions").children) {
      chip.disabled = !player.live;
      chip.setAttribute("aria-pressed", chip.value === (player.motion ?? ""));
    }
  }

  #showPast() {
    const { player } = this;
    const past = player.phase === "paused" && player.stepsLeft > 0 && !player.split;
    $("past").hidden = !past;
    if (!past) return;
    const seconds = (player.stepsLeft * player.stepSeconds).toFixed(1);
    setText($("past-by"), `${seconds} s in the past.`);
    setText($("past-cost"), jumpCost(player));
  }

  #showCard() {
    const { player } = this;
    const card = this.#cardOf(player);
    $("card").hidden = !card;
    if (!card) return;
    setText($("card-number"), card.number ?? "");
    setText($("card-title"), card.title);
    setText($("card-text"), card.text ?? "");
    $("card").classList.toggle("busy", Boolean(card.busy));
    $("card-button").hidden = !card.button;
    setText($("card-button"), card.button ?? "");
  }

  #cardOf({ phase, place, progress, retryAt, problem, branches }) {
    const long = progress && (progress.total * (branches.replayMs || SHORT_MS)) > SHORT_MS;
    if (long) {
      return { busy: true, title: "Replaying", text: `${progress.done} of ${progress.total} steps` };
    }
    switch (phase) {
      case "connecting": return { busy: true, title: "Connecting" };
      case "opening": return { busy: true, title: "Opening a world" };
      case "waiting": return {
        number: String(place),
        title: place === 1 ? "You are next" : `${place - 1} before you`,
        text: "All places are taken. Yours opens by itself when one is free.",
      };
      case "lost": {
        const wait = Math.max(0, Math.ceil((retryAt - performance.now()) / 1000));
        return {
          title: "Connection lost",
          text: wait ? `Trying again in ${wait} s. Your world is kept.` : "Trying again",
          button: "Try now",
        };
      }
      case "ended": {
        const [title, text] = ENDED[problem] ?? ["The world has ended", problem];
        return { title, text, button: BUTTONS[problem] ?? "Start again" };
      }
      case "failed": return { title: "The server refused", text: problem, button: "Connect again" };
      default: return null;
    }
  }
}

/** Says what the jump to the playhead cost, or is expected to cost. */
function jumpCost({ jump, head, branches }) {
  const replayed = jump?.replayed ?? branches.replayed(head.branch, head.step);
  const ms = Math.round(jump?.ms ?? replayed * branches.replayMs);
  const steps = replayed === 1 ? "1 step" : `${replayed} steps`;
  return jump ? `Coming here replayed ${steps} in ${ms} ms.`
    : `Coming here replays ${steps}, about ${ms} ms.`;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
