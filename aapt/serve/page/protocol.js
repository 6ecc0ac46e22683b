// Reads the server's binary messages (GET /schema describes them).

export const PROTOCOL = 1;

const HEADER_BYTES = 64;
const FORMATS = ["image/jpeg", "image/webp", "video/avc"];
/** Kinds of messages: video frames, and files, which are the only image of theirs. */
export const FRAMES = 0, RECORDING = 1, SAVED = 2;

const FIRST = 1, REDO = 2, SEEK = 4;

/**
 * Parses one binary message: a 64-byte little-endian header, the images' lengths, the images.
 *
 * Throws an Error that names what was expected when the message is none of this protocol's.
 */
export function parseFrames(buffer) {
  const view = new DataView(buffer);
  if (buffer.byteLength < HEADER_BYTES || view.getUint32(0) !== 0x41415054) {
    throw new Error("message: expected frames that start with AAPT; reload the page");
  }
  if (view.getUint8(4) !== PROTOCOL) {
    throw new Error(
      `protocol: expected ${PROTOCOL}, got ${view.getUint8(4)}; reload the page`);
  }
  const flags = view.getUint8(7);
  const count = view.getUint8(49);
  const images = [];
  let start = HEADER_BYTES + 4 * count;
  for (let index = 0; index < count; index++) {
    const length = view.getUint32(HEADER_BYTES + 4 * index, true);
    images.push(new Uint8Array(buffer, start, length));
    start += length;
  }
  return {
    kind: view.getUint8(5),
    lane: view.getUint8(6),
    first: Boolean(flags & FIRST),
    redo: Boolean(flags & REDO),
    seek: Boolean(flags & SEEK),
    branch: view.getUint32(8, true),
    step: view.getUint32(12, true),
    input: view.getUint32(16, true),
    prompt: view.getUint32(20, true),
    time: view.getFloat64(24, true),
    wait: view.getFloat32(32, true),
    model: view.getFloat32(36, true),
    pixels: view.getFloat32(40, true),
    encode: view.getFloat32(44, true),
    firstShown: view.getUint8(48),
    type: FORMATS[view.getUint16(50, true)],
    images,
  };
}
