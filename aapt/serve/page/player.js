// The state of a played world: what the server has said, what is asked of it, what is shown.

import { Backup } from "./backup.js";
import { Branches } from "./branches.js";
import { CameraControls, controlsOf } from "./controls.js";
import { FrameMemory } from "./frame_memory.js";
import { PoseMemory } from "./pose_memory.js";
import { RECORDING, SAVED } from "./protocol.js";
import { Receipts } from "./receipts.js";

const SEEK_QUIET_MS = 180; // a jump is asked for once the scrubbing rests

/**
 * Plays one world over a connection.
 *
 * phase: connecting, opening, waiting (in line), ready (never played), playing, paused, lost, ended
 * or failed. Dispatches "change" after any change of state, "welcome" (detail: the message),
 * "obeyed" (detail: {presses, frame}), "said" (detail: a line to show), "prompt" (detail: the prompt in
 * force, unless the player changed it), "pose" (detail: {lane, pose}, of what is shown) and "control"
 * (detail: {lane, control}, of a figure, unless a joint changed it).
 */
export class Player extends EventTarget {
  phase = "connecting";
  head = { branch: 0, step: 0 };
  prompt = "";
  seed = 0;
  stepSeconds = 1 / 6;
  place = 0; // in line
  progress = null; // {done, total} of a replay
  retryAt = 0;
  problem = "";
  jump = null; // what the last jump cost: {replayed, ms}
  split = null; // {branches, controls}
  redo = false;
  following = false; // recorded controls are played, not the player's
  recording = null; // {branch, from}
  future = 0; // the branch whose steps after the playhead are the ones left
  marks = [];
  branches = new Branches();
  memory = new FrameMemory();
  poses = new PoseMemory();
  controls = new CameraControls();
  receipts = new Receipts();
  #sequence = 0;
  #promptSequence = 0;
  #waitingPrompt = null; // its sequence, until a frame honours it
  #controls = [{ yaw: 0, forward: 0 }, { yaw: 0, forward: 0 }]; // of the lanes
  #steered = false; // controls drive the model, not its prompt alone
  #posesShown = [null, null]; // of the lanes
  #posedSince = false; // the player has moved the figure since a jump or a replay was asked for
  #followHeard = false;
  #scrubbing = false; // from the first move until the server has sought
  #seekTimer = 0;
  #seekTo = null;
  #afterSeek = [];
  #resumePlaying = false;
  #opening = true; // messages are of the world before
  #first = "sample"; // the start of a new world
  #sample = false; // the world asked for is of that start
  #behind = false; // the server has the world before until it opens the one asked for
  #walk = null; // an action log to open in place of an image
  #recorded = null; // {resolve, reject} of the recording under way

  constructor(connection, stage, { walk }) {
    super();
    this.connection = connection;
    this.stage = stage;
    this.#walk = walk;
    stage.onPaint = (frame, now) => this.#painted(frame, now);
    connection.addEventListener("message", ({ detail }) => this.#heard(detail));
    connection.addEventListener("frames", ({ detail }) => this.#received(detail));
    connection.addEventListener("file", ({ detail }) => this.#filed(detail));
    connection.addEventListener("lost", ({ detail }) => this.#lost(detail));
    if (walk) connection.token = null;
    this.backup = new Backup(connection, () => this.playing);
  }

  get playing() {
    return this.phase === "playing";
  }

  /** True if there is a world to act on. */
  get live() {
    return ["ready", "playing", "paused"].includes(this.phase);
  }

  /** Steps between the playhead and the end of the branch it was scrubbed on. */
  get stepsLeft() {
    return (this.branches.get(this.future)?.to_step ?? this.head.step) - this.head.step;
  }

  open({ image = this.#first, prompt = null, seed = 0, log = null, saved = null }) {
    this.#behind = this.live;
    this.#leaveWorld();
    this.phase = "opening";
    this.#sample = image === this.#first && !log;
    const wish = log ? { log, saved } : { image, prompt, seed };
    this.connection.send({ type: "open", ...wish });
    this.#changed();
  }

  /**
   * Uploads an action log, and the snapshot of a step on its way if there is one, and opens the
   * log's world; says so if the server refuses it.
   */
  async openWalk(walk, snapshot = null) {
    try {
      const log = await this.connection.upload(walk);
      const saved = snapshot && await this.connection.upload(snapshot).catch(() => null);
      this.open({ log, saved });
    } catch (error) {
      this.#refused(error.message);
    }
  }

  /** Starts again after the end: a world that slept is rebuilt from its log, others are new. */
  again() {
    if (this.phase === "ended") {
      this.connection.token = null;
      if (this.problem !== "idle") this.backup.log = null;
    }
    this.phase = "connecting";
    this.connection.connect();
    this.#changed();
  }

  play() {
    if (!this.live || this.playing) return;
    this.#whenSought(() => {
      this.phase = "playing";
      this.connection.send({ type: "play" });
    });
  }

  pause() {
    if (!this.playing) return;
    this.phase = "paused";
    if (this.following) this.#rest(this.poses.newest);
    this.following = false;
    this.connection.send({ type: "pause" });
    this.backup.fetch();
    this.receipts.forgetPending();
    this.#changed();
  }

  reset(seed = this.seed) {
    if (!this.live) return;
    const playing = this.playing;
    this.#leaveWorld();
    this.connection.send({ type: "reset", seed });
    if (playing) this.phase = "playing";
    this.#changed();
  }

  /** Takes a change of a lane's camera; `key` names a press, whose receipt is then waited for. */
  steer({ lane, yaw, forward, taps, time, key }) {
    this.#steer(lane, { yaw, forward }, { taps, time, key, moves: Boolean(key) });
  }

  /** Takes a pose of a lane's figure, from its joints; `key` names the joint. */
  pose({ lane, points, time, key }) {
    this.#steer(lane, { points }, { time, key, moves: true });
  }

  /** Loops a motion of the figure; null to hold the pose that is shown. */
  move(motion, time = performance.now()) {
    const control = motion ? { motion } : this.#held(0);
    if (!control || !this.live) return;
    this.#steer(0, control, { time, key: motion, moves: Boolean(motion) });
    this.#emit("control", { lane: 0, control });
  }

  /** The motion that lane 0 loops, null while its figure holds a pose. */
  get motion() {
    return this.#controls[0]?.motion ?? null;
  }

  #steer(lane, control, { taps = null, time, key, moves }) {
    if (!this.live) {
      this.#controls[lane] = control;
      return;
    }
    this.#posedSince = true;
    if (this.following && (moves || this.controls.posed)) this.pause(); // the player takes over
    this.#controls[lane] = control;
    if (this.split) this.split.controls[lane] = this.controls.indexOf(control);
    // The input goes out first, so that the first step already has it.
    const sequence = this.#sendInput(lane, taps, time);
    if (moves) this.play();
    // A redo replaces queued frames; without it the server makes the next pass early.
    const early = this.#steered && !this.redo && !this.split;
    if (this.playing && early) this.stage.hasten(this.receipts.lastStep);
    if (key && this.playing) this.receipts.pressed(sequence, time, key, lane);
  }

  changePrompt(text) {
    if (!this.live || text === this.prompt) return;
    this.prompt = text;
    this.#promptSequence += 1;
    this.#waitingPrompt = this.#promptSequence;
    const sequence = this.#promptSequence;
    this.#whenSought(() => this.connection.send({ type: "prompt", sequence, text }));
  }

  /** Moves the playhead; the server follows once it rests (`done`). */
  async scrub(branch, step, done) {
    if (!this.live) return;
    if (this.split) this.endSplit(0);
    this.pause();
    this.#scrubbing = true;
    this.#posedSince = false;
    this.stage.cut();
    this.phase = "paused";
    this.head = { branch: this.branches.owner(branch, step), step };
    this.future = branch;
    this.jump = null;
    this.#seekTo = { branch: this.head.branch, step };
    clearTimeout(this.#seekTimer);
    if (done) this.#seekTimer = setTimeout(() => this.#flushSeek(), SEEK_QUIET_MS);
    this.#changed();
    this.#showPose(0, this.poses.get(this.head.branch, step)?.at(-1));
    const bitmap = await this.memory.last(this.head.branch, step);
    if (bitmap && this.#scrubbing && this.head.step === step) this.stage.preview(0, bitmap);
    bitmap?.close();
  }

  /** Goes back from the playhead, as from where the last jump would end. */
  rewind(steps) {
    if (!this.live || this.head.step === 0) return;
    const branch = this.stepsLeft > 0 ? this.future : this.head.branch;
    this.scrub(branch, Math.max(0, this.head.step - steps), true);
  }

  /** Plays the controls left again from here, under the prompt in force. */
  follow() {
    if (!this.live || this.stepsLeft <= 0) return;
    const branch = this.future;
    this.#whenSought(() => {
      this.connection.send({ type: "follow", branch });
      this.following = true;
      this.#followHeard = false;
      this.phase = "playing";
      this.#posedSince = false;
      this.#emit("control", { lane: 0, control: { motion: "recorded" } });
    });
  }

  /** Forks the world in two, under the controls that a split begins with. */
  startSplit() {
    if (!this.live) return;
    const controls = this.controls.split(this.#controls[0]);
    this.#whenSought(() => {
      const { branch, step } = this.head;
      this.split = { branches: null, controls };
      this.stage.copy();
      this.#posedSince = true; // both figures keep their goals
      const given = controls.map((index) => this.controls.lanes[index][1]);
      if (this.controls.posed) this.#controls[1] = given[1] ?? this.#controls[0];
      this.connection.send({ type: "split", branch, step, controls: given });
      this.#emit("control", { lane: 1, control: this.#controls[1] });
    });
  }

  /** Gives a half of the screen another control to hold. */
  changeLane(lane, index) {
    this.split.controls[lane] = index;
    this.#controls[lane] = this.controls.lanes[index][1] ?? this.#held(lane) ?? this.#controls[lane];
    this.#sendInput(lane, null, performance.now());
    this.#emit("control", { lane, control: this.#controls[lane] });
    this.#changed();
  }

  /** Ends a split; the half `keep`, 0 or 1, plays on if it played. */
  endSplit(keep) {
    if (!this.split) return;
    const playing = this.playing;
    const kept = this.split.branches?.[keep];
    this.split = null;
    this.stage.cut();
    this.connection.send({ type: "split", controls: null });
    if (this.controls.posed) {
      this.#controls[0] = this.#controls[keep];
      this.#sendInput(0, null, performance.now());
      this.#emit("control", { lane: 0, control: this.#controls[0] });
    }
    if (kept !== undefined) {
      const step = this.branches.get(kept)?.to_step ?? this.head.step;
      this.head = { branch: kept, step };
      if (keep === 1) {
        this.scrub(kept, step, true);
        this.#posedSince = true; // its figure keeps its goal
        if (playing) this.play();
      }
    }
    this.#changed();
  }

  setRedo(on) {
    this.redo = on;
    this.connection.send({ type: "redo", on });
    this.#changed();
  }

  startRecording() {
    this.recording = { branch: this.head.branch, from: this.head.step };
    this.#changed();
  }

  /** Ends a recording; returns its branch and steps, null if nothing was played. */
  stopRecording() {
    const { from } = this.recording;
    const { branch, step: to } = this.head;
    this.recording = null;
    this.#changed();
    return to > from ? { branch, from, to } : null;
  }

  /** Fetches a video of steps as they were shown; resolves to the bytes of an MP4. */
  async fetchRecording({ branch, from, to }) {
    if (this.#recorded) throw new Error("record: expected one video at a time; wait for the first");
    this.connection.send({ type: "record", branch, first: from, last: to });
    return new Promise((resolve, reject) => { this.#recorded = { resolve, reject }; });
  }

  #leaveWorld() {
    this.backup.saved = null;
    this.#opening = true;
    this.stage.cut();
    this.branches.clear();
    this.memory.clear();
    this.poses.clear();
    this.receipts.forgetPending();
    this.marks = [];
    this.recording = null;
    this.#forgetSteps();
    this.future = 0;
    this.head = { branch: 0, step: 0 };
  }

  /** Forgets the split, the replay and the jump under way. */
  #forgetSteps() {
    this.split = null;
    this.progress = null;
    this.following = false;
    this.#scrubbing = false;
    this.#afterSeek = [];
    this.#waitingPrompt = null;
    clearTimeout(this.#seekTimer);
    this.#seekTo = null;
  }

  #sendInput(lane, taps, time) {
    this.#sequence += 1;
    const sequence = this.#sequence;
    const message = { ...this.controls.message(this.#controls[lane], taps), lane, sequence, time };
    const shown = this.redo && this.stage.shown;
    this.connection.send(shown ? { ...message, shown } : message);
    return sequence;
  }

  /** The control of a lane that lets go: no deflection, or the pose that is shown, null before one. */
  #held(lane) {
    if (!this.controls.posed) return { yaw: 0, forward: 0 };
    const points = this.#posesShown[lane];
    return points && { points };
  }

  /** After a jump or a replay: the figure holds the pose of a step, or goes on with its motion. */
  #rest({ branch, step } = this.head) {
    const points = this.poses.get(branch, step)?.at(-1);
    if (!points || this.#posedSince) return;
    const control = this.motion ? this.#controls[0] : { points };
    this.#controls[0] = control;
    this.#sendInput(0, null, performance.now());
    this.#emit("control", { lane: 0, control });
  }

  #showPose(lane, pose) {
    if (!pose) return;
    this.#posesShown[lane] = pose;
    this.#emit("pose", { lane, pose });
  }

  /** Acts now, or once the jump under way has ended. */
  #whenSought(action) {
    this.#flushSeek();
    if (this.#scrubbing) this.#afterSeek.push(action);
    else action();
    this.#changed();
  }

  #flushSeek() {
    clearTimeout(this.#seekTimer);
    if (!this.#seekTo) return;
    this.stage.cut();
    this.connection.send({ type: "seek", ...this.#seekTo });
    this.#seekTo = null;
  }

  #heard(message) {
    const hear = {
      welcome: () => this.#welcomed(message),
      queued: () => { this.phase = "waiting"; this.place = message.place; },
      replaying: () => { this.progress = message; },
      opened: () => this.#opened(message),
      posed: () => { if (!this.#opening) this.poses.put(message); },
      state: () => this.#stated(message),
      tree: () => { if (!this.#opening) this.branches.update(message); },
      sought: () => this.#sought(message),
      split: () => this.#splitAnswered(message),
      log: () => this.backup.logged(message.lines),
      error: () => this.#failed(message),
      ended: () => this.#ended(message.reason),
    }[message.type];
    hear?.();
    this.#changed();
  }

  #welcomed(message) {
    this.stepSeconds = message.frames_per_step / message.fps;
    this.#steered = message.driven_by !== "prompt";
    this.controls = controlsOf(message);
    this.#first = message.gallery[0]?.name ?? "sample";
    if (this.controls.posed) this.#controls = this.#controls.map(({ motion }) => ({ motion }));
    this.stage.configure(message);
    this.#emit("welcome", message);
    this.#opening = true;
    this.phase = "opening";
    if (message.resumed) return;
    // Another server does not know the token: it gets the world's log and snapshot.
    const walk = this.#walk ?? this.backup.walk;
    const saved = this.#walk ? null : this.backup.saved;
    this.#walk = null;
    if (walk) this.openWalk(walk, saved);
    else this.open({});
  }

  #opened({ branch, step, seed, prompt }) {
    this.stage.cut();
    this.#opening = this.#behind = false;
    this.#scrubbing = this.#posedSince = false;
    this.progress = null;
    this.head = { branch, step };
    this.future = branch;
    this.seed = seed;
    this.prompt = prompt;
    this.#emit("prompt", prompt);
    this.connection.send({ type: "log" });
    if (this.redo) this.connection.send({ type: "redo", on: true });
    const { yaw, forward } = this.#controls[0];
    if (yaw || forward) this.#sendInput(0, null, performance.now()); // keys that are still held
    const keepsPlaying = this.phase === "playing"; // a reset keeps playing what played
    this.phase = keepsPlaying ? "playing" : step ? "paused" : "ready";
    if (this.#resumePlaying) {
      this.#resumePlaying = false;
      this.play();
    }
  }

  #sought({ branch, step, prompt, replayed, ms }) {
    if (this.#seekTo) return; // the playhead has moved on since
    this.#scrubbing = false;
    this.progress = null;
    this.phase = "paused";
    this.head = { branch, step };
    if (prompt !== this.prompt && this.#waitingPrompt === null) {
      this.prompt = prompt;
      this.#emit("prompt", prompt);
    }
    this.jump = { replayed, ms };
    this.#rest(); // before what was to follow the jump
    for (const action of this.#afterSeek.splice(0)) action();
  }

  #splitAnswered({ branches, branch }) {
    this.progress = null;
    if (branches && this.split) this.split.branches = branches;
    else this.split = null;
    this.stage.cut();
    if (!branches) this.head.branch = branch;
  }

  #stated({ playing, following }) {
    this.#followHeard ||= following; // a state from before the request says nothing of it
    if (!this.following || !this.#followHeard) return;
    if (!playing) this.phase = "paused"; // the recorded controls have ended
    if (!following) this.#rest(this.poses.newest);
    this.following = following;
  }

  #ended(reason) {
    this.phase = "ended";
    this.problem = reason;
    this.stage.cut();
    this.connection.refuse();
  }

  #filed({ kind, images: [bytes] }) {
    if (kind === SAVED) this.backup.saved = new Blob([bytes]);
    if (kind === RECORDING) {
      this.#recorded?.resolve(bytes);
      this.#recorded = null;
    }
  }

  #failed({ code, message, fatal }) {
    if (code === "record" && this.#recorded) {
      this.#recorded.reject(new Error(message));
      this.#recorded = null;
      return;
    }
    if (!fatal) {
      this.#scrubbing = false;
      this.progress = null;
      this.#refused(message);
      return;
    }
    this.connection.refuse();
    this.phase = "failed";
    this.problem = message;
  }

  /** Says why something was refused; if it was a world, goes back to the one before, or the first. */
  #refused(message) {
    this.#emit("said", message);
    if (this.live) return;
    if (this.#behind) {
      this.#behind = false;
      this.connection.connect();
      return;
    }
    if (this.#sample) {
      this.phase = "failed";
      this.problem = message;
      return;
    }
    this.backup.log = null;
    this.open({});
  }

  #lost({ retryAt }) {
    this.#resumePlaying ||= this.playing;
    this.#recorded?.reject(new Error("record: expected a video, but the connection was lost"));
    this.#recorded = null;
    this.#forgetSteps();
    this.phase = "lost";
    this.retryAt = retryAt;
    this.stage.cut();
    this.receipts.forgetPending();
    this.#changed();
  }

  #received(frames) {
    if (this.#opening) return;
    const { branch, step, type, images } = frames;
    frames.poses = this.poses.get(branch, step);
    this.memory.put(branch, step, type, images);
    this.branches.advance(branch, step);
    if (!frames.seek && !frames.first) this.receipts.stepped(frames);
    if (this.#scrubbing && (this.#seekTo || !frames.seek)) return; // made before this jump
    if (frames.first || frames.seek) this.#rest(frames);
    this.stage.receive(frames, this.receipts.awaits(frames));
  }

  #painted(frame, now) {
    const { branch, step } = frame;
    const moved = frame.lane === 0 && (branch !== this.head.branch || step !== this.head.step);
    if (moved) {
      this.head = { branch, step };
      if (this.playing) this.future = branch;
    }
    this.#showPose(frame.lane, frame.pose);
    const presses = this.receipts.painted(frame, now);
    if (presses.length) {
      this.marks.push({ branch, step, kind: "key" });
      this.#emit("obeyed", { presses, frame });
    }
    const waiting = this.#waitingPrompt;
    if (waiting !== null && frame.prompt >= waiting) {
      this.marks.push({ branch, step, kind: "prompt" });
      this.#waitingPrompt = null;
    }
    if (moved || presses.length) this.#changed();
  }

  #changed() {
    this.#emit("change");
  }

  #emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
