// Files of the visitor: walks in links, recordings.

/** The walk in the page's own link, as a file; null if there is none. */
export async function sharedWalk() {
  const letters = new URLSearchParams(location.hash.slice(1)).get("walk");
  if (!letters) return null;
  history.replaceState(null, "", location.pathname + location.search);
  return new Blob([await unpack(letters)], { type: "application/jsonl" });
}

/** Saves bytes as a file of the visitor's. */
export function saveFile(bytes, type, name) {
  const address = URL.createObjectURL(new Blob([bytes], { type }));
  Object.assign(document.createElement("a"), { href: address, download: name }).click();
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
