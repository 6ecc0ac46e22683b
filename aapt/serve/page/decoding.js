// Decodes the images of a message: JPEG, WebP, or H.264 by WebCodecs.

const TRIAL = "avc1.4d401f"; // main profile, 1280 x 720

/** The formats that this browser decodes, as hello names them. Secure pages alone have WebCodecs. */
export async function decodableFormats() {
  const images = ["jpeg", "webp"];
  if (!window.VideoDecoder) return images;
  const { supported } = await VideoDecoder.isConfigSupported({ codec: TRIAL }).catch(() => ({}));
  return supported ? ["h264", ...images] : images;
}

/** Decodes images of one type to bitmaps, in their order. */
export function decodeImages(images, type) {
  if (type === "video/avc") return decodeVideo(images);
  return Promise.all(images.map((image) => createImageBitmap(new Blob([image], { type }))));
}

/** Decodes access units, the first of which is an IDR picture; no other message is needed. */
async function decodeVideo(units) {
  const bitmaps = [];
  let problem = null;
  const decoder = new VideoDecoder({
    output: (frame) => {
      bitmaps.push(createImageBitmap(frame));
      frame.close();
    },
    error: (error) => { problem = error; },
  });
  decoder.configure({ codec: codecOf(units[0]), optimizeForLatency: true });
  for (const [index, data] of units.entries()) {
    const type = index ? "delta" : "key";
    decoder.decode(new EncodedVideoChunk({ type, timestamp: index, data }));
  }
  await decoder.flush().catch((error) => { problem ??= error; });
  if (decoder.state !== "closed") decoder.close();
  if (problem) throw problem;
  return Promise.all(bitmaps);
}

/** The codec's name, from the sequence parameters with which an IDR picture starts (Annex B). */
function codecOf(unit) {
  const start = unit[2] === 1 ? 3 : 4;
  const letters = [...unit.slice(start + 1, start + 4)].map((byte) => byte.toString(16));
  return `avc1.${letters.map((pair) => pair.padStart(2, "0")).join("")}`;
}
