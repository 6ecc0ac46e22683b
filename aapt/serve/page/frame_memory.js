// Keeps the encoded frames of past steps, so that scrubbing shows them at once.

import { decodeImages } from "./decoding.js";

const BUDGET_BYTES = 48 * 2 ** 20;

/** Encoded images by branch and step; the oldest are forgotten beyond 48 MiB. */
export class FrameMemory {
  #steps = new Map(); // "branch:step" -> {images, type}; a Map keeps the order of insertion
  #bytes = 0;

  put(branch, step, type, images) {
    const key = `${branch}:${step}`;
    if (this.#steps.has(key)) this.#forget(key);
    this.#steps.set(key, { images, type });
    this.#bytes += size(images);
    while (this.#bytes > BUDGET_BYTES) this.#forget(this.#steps.keys().next().value);
  }

  /** Decodes the last image of a step; null if it is not kept. */
  async last(branch, step) {
    const kept = this.#steps.get(`${branch}:${step}`);
    if (!kept) return null;
    const alone = kept.type !== "video/avc"; // images that no other one is needed for
    const bitmaps = await decodeImages(alone ? kept.images.slice(-1) : kept.images, kept.type);
    for (const bitmap of bitmaps.slice(0, -1)) bitmap.close();
    return bitmaps.at(-1);
  }

  clear() {
    this.#steps.clear();
    this.#bytes = 0;
  }

  #forget(key) {
    this.#bytes -= size(this.#steps.get(key).images);
    this.#steps.delete(key);
  }
}

function size(images) {
  return images.reduce((sum, image) => sum + image.byteLength, 0);
}
