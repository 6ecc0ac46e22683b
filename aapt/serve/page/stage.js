// Decodes the frames that arrive, paces them and paints them, in one lane or two.

import { decodeImages } from "./decoding.js";
import { close, Pacer } from "./pacer.js";

const LARGEST = 320; // pixels to which small frames are enlarged by a cubic filter; the page's is linear

/**
 * Paints frames on the canvases of two lanes.
 *
 * Calls `onPaint(frame, now)` after each painted frame; a frame is {lane, branch, step, index, input,
 * prompt, pose, bitmap}, with the pose of a figure or null. Frames of a seek are painted at once, the
 * others at an even pace.
 */
export class Stage {
  #order = Promise.resolve(); // decodes end in the order of arrival
  #epoch = 0; // frames of an epoch before are dropped
  #running = false;

  constructor(canvases, onPaint) {
    this.lanes = canvases.map((canvas) => ({
      canvas,
      context: canvas.getContext("2d", { alpha: false }),
      pacer: new Pacer(1000 / 6, 4),
      shown: null,
    }));
    this.onPaint = onPaint;
  }

  /** Takes the size of the model's frames, and how many come how often. */
  configure({ width, height, fps, frames_per_step: count }) {
    for (const lane of this.lanes) {
      const scale = Math.max(1, Math.floor(LARGEST / width));
      if (lane.canvas.width !== scale * width || lane.canvas.height !== scale * height) {
        Object.assign(lane.canvas, { width: scale * width, height: scale * height });
        lane.context.imageSmoothingQuality = "high";
      }
      lane.pacer = new Pacer((1000 * count) / fps, count);
    }
  }

  /** Milliseconds of queued frames. */
  get backlog() {
    return this.lanes[0].pacer.backlog(performance.now());
  }

  /** The step painted last, and the number of its frames painted; null before the first. */
  get shown() {
    const frame = this.lanes[0].shown;
    return frame && { step: frame.step, frames: frame.index + 1 };
  }

  /** Drops what is queued or being decoded: the stream has moved elsewhere. */
  cut() {
    this.#epoch += 1;
    for (const { pacer } of this.lanes) pacer.clear();
  }

  /** Takes parsed frames; with `urgent` they are shown before what is queued, which is dropped. */
  receive(message, urgent) {
    const epoch = this.#epoch;
    const decoded = decode(message);
    this.#order = this.#order.then(async () => {
      const frames = await decoded;
      if (epoch !== this.#epoch) {
        close(frames);
        return;
      }
      const { pacer } = this.lanes[message.lane];
      if (message.first || message.seek) {
        this.#paint(frames.pop(), performance.now());
        close(frames);
      } else if (message.redo) {
        close(frames.splice(0, message.firstShown));
        pacer.replace(frames);
      } else {
        pacer.push(frames, performance.now(), urgent);
        this.#run();
      }
    }).catch(() => { /* an image that does not decode is a frame not shown */ });
  }

  /** Shows what is queued faster: the next pass is early, but takes `lead` milliseconds. */
  hasten(lead) {
    this.lanes[0].pacer.hasten(performance.now(), lead);
  }

  /** Shows an image that is not of the stream as it plays: a remembered frame. */
  preview(lane, bitmap) {
    const { canvas, context } = this.lanes[lane];
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  }

  /** Shows on the second lane what the first one shows. */
  copy() {
    const [first, second] = this.lanes;
    second.context.drawImage(first.canvas, 0, 0);
  }

  #run() {
    if (this.#running) return;
    this.#running = true;
    const loop = (now) => {
      let busy = false;
      for (const { pacer } of this.lanes) {
        const frame = pacer.take(now);
        if (frame) this.#paint(frame, performance.now());
        busy ||= pacer.backlog(now) > 0;
      }
      this.#running = busy;
      if (busy) requestAnimationFrame(loop);
    };
    requestAnimationFrame(loop);
  }

  #paint(frame, now) {
    const lane = this.lanes[frame.lane];
    lane.context.drawImage(frame.bitmap, 0, 0, lane.canvas.width, lane.canvas.height);
    frame.bitmap.close();
    lane.shown = frame;
    this.onPaint(frame, now);
  }
}

async function decode(message) {
  const bitmaps = await decodeImages(message.images, message.type);
  const { lane, branch, step, input, prompt, poses } = message;
  return bitmaps.map((bitmap, index) => (
    { lane, branch, step, index, input, prompt, pose: poses?.[index] ?? null, bitmap }));
}
