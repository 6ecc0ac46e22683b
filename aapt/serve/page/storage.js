// Small settings that outlive the page, in browsers that keep them.

/** Reads a setting from `localStorage` or `sessionStorage`; null if it is not kept. */
export function read(storage, name) {
  try {
    return window[storage].getItem(`aapt.${name}`);
  } catch {
    return null; // the browser is told to keep nothing
  }
}

/** Keeps a setting; null forgets it. */
export function write(storage, name, value) {
  try {
    if (value === null) window[storage].removeItem(`aapt.${name}`);
    else window[storage].setItem(`aapt.${name}`, value);
  } catch { /* it holds until the page is left */ }
}
