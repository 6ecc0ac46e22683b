// The dialog that gives a walk away as a link or a file.

import { pack } from "./files.js";

const LONGEST_LINK = 30_000; // letters that browsers and messengers carry

/** The dialog with the link and the file of a walk (the lines of an action log). */
export class ShareDialog {
  #address = null;

  constructor(dialog) {
    this.dialog = dialog;
    this.link = dialog.querySelector("#link");
    this.note = dialog.querySelector("#link-note");
    this.file = dialog.querySelector("#file");
    this.copy = dialog.querySelector("#copy");
    this.copy.addEventListener("click", async () => {
      this.link.select();
      await copyText(this.link);
      this.note.textContent = "Copied.";
    });
    dialog.addEventListener("close", () => URL.revokeObjectURL(this.#address));
  }

  async open(lines) {
    const text = `${lines.join("\n")}\n`;
    this.#address = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
    this.file.href = this.#address;
    const base = location.href.split("#")[0];
    const link = `${base}#walk=${await pack(text)}`;
    const fits = link.length <= LONGEST_LINK;
    this.link.value = fits ? link : "";
    this.copy.disabled = !fits;
    this.note.textContent = fits
      ? `${link.length} letters; the whole walk is in them.`
      : "This walk is too long for a link. Save it as a file, and drop the file on the page.";
    this.dialog.showModal();
  }
}

async function copyText(field) {
  if (navigator.clipboard) await navigator.clipboard.writeText(field.value);
  else document.execCommand("copy"); // over plain HTTP from another host there is no clipboard
}
