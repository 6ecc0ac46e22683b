// Files sent to the server or fetched from it: images, walks, recordings.

/** Sends a file to the server; resolves to "upload:ID". Rejects with the server's words. */
export async function upload(file) {
  const answer = await fetch("upload", { method: "POST", body: file });
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    throw new Error(body.error ?? `upload: expected an image, got an error ${answer.status}`);
  }
  return `upload:${body.id}`;
}

/** The walk in the page's own link, as a file; null if there is none. */
export async function sharedWalk() {
  const letters = new URLSearchParams(location.hash.slice(1)).get("walk");
  if (!letters) return null;
  history.replaceState(null, "", location.pathname + location.search);
  return new Blob([await unpack(letters)], { type: "application/jsonl" });
}

/** Saves a recording of the steps `from` to `to`; rejects with the server's words. */
export async function saveRecording(token, { branch, from, to }) {
  const query = new URLSearchParams({ branch, from, to });
  const answer = await fetch(`record/${token}.mp4?${query}`);
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    throw new Error(body.error ?? `record: expected a video, got an error ${answer.status}`);
  }
  const address = URL.createObjectURL(await answer.blob());
  const link = Object.assign(document.createElement("a"), {
    href: address, download: `aapt-${branch}-${from}-${to}.mp4`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** Packs text into a link's fragment: deflated, then base64 with the letters of a URL. */
export async function pack(text) {
  const stream = new Blob([text]).stream().pipeThrough(new CompressionStream("deflate-raw"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  let letters = "";
  for (const byte of bytes) letters += String.fromCharCode(byte);
  return btoa(letters).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
}

/** Unpacks what `pack` made; rejects when the letters are not its own. */
export async function unpack(letters) {
  const text = atob(letters.replace(/-/g, "+").replace(/_/g, "/"));
  const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Response(stream).text();
}
