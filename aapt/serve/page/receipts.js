// Measures what a player feels: frames per second, step times, and key to pixel.

const KEPT = 200; // samples in a percentile
const FPS_WINDOW_MS = 2000;

/** The value below which a share of the samples lie (nearest rank), null if there are none. */
export function percentile(samples, share) {
  if (!samples.length) return null;
  const sorted = [...samples].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(share * sorted.length) - 1)];
}

/** Samples of steps and of key presses; times are milliseconds of `performance.now()`. */
export class Receipts {
  #paints = [];
  #pending = []; // presses no frame has honoured yet: {sequence, time, key, lane}
  steps = [];
  keys = [];
  redone = 0;

  pressed(sequence, time, key, lane) {
    this.#pending.push({ sequence, time, key, lane });
  }

  stepped({ model, pixels, encode, redo }) {
    keep(this.steps, model + pixels + encode);
    if (redo) this.redone += 1;
  }

  /** Milliseconds of the newest step, 0 before the first. */
  get lastStep() {
    return this.steps.at(-1) ?? 0;
  }

  /** True if frames with this lane and input are the first to honour a press. */
  awaits({ lane, input }) {
    return this.#pending.some((press) => press.lane === lane && press.sequence <= input);
  }

  /** Notes a painted frame; returns the presses it was the first to honour, with their `ms`. */
  painted(frame, now) {
    if (frame.lane === 0) {
      this.#paints.push(now);
      while (now - this.#paints[0] > FPS_WINDOW_MS) this.#paints.shift();
    }
    const honoured = (press) => press.lane === frame.lane && press.sequence <= frame.input;
    const obeyed = this.#pending.filter(honoured).map((p) => ({ ...p, ms: now - p.time }));
    this.#pending = this.#pending.filter((press) => !honoured(press));
    for (const { ms } of obeyed) keep(this.keys, ms);
    return obeyed;
  }

  /** Forgets presses that no frame will honour: the stream was paused, moved or lost. */
  forgetPending() {
    this.#pending = [];
    this.#paints = [];
  }

  get fps() {
    const paints = this.#paints;
    if (paints.length < 2) return null;
    return (1000 * (paints.length - 1)) / (paints.at(-1) - paints[0]);
  }
}

function keep(samples, value) {
  samples.push(value);
  if (samples.length > KEPT) samples.shift();
}
