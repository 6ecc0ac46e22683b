// The dialog that starts a world: a first image from the gallery, a file, the clipboard or a drop.

const MOST_SEED = 2 ** 31; // a seed one can read aloud; the server takes larger ones

export function randomSeed() {
  return Math.floor(Math.random() * MOST_SEED);
}

/**
 * Calls `onStart({image, prompt, seed})`, and `onWalk(file)` for a shared walk. `upload` sends a file
 * and resolves to its id.
 */
export class WorldDialog {
  #choice = "sample";

  constructor(dialog, { onStart, onWalk, upload }) {
    this.dialog = dialog;
    this.upload = upload;
    this.onStart = onStart;
    this.onWalk = onWalk;
    this.images = dialog.querySelector("#images");
    this.prompt = dialog.querySelector("#world-prompt");
    this.seed = dialog.querySelector("#seed");
    this.problem = dialog.querySelector("#upload-error");
    dialog.querySelector("#dice").addEventListener("click", () => {
      this.seed.value = randomSeed();
    });
    dialog.addEventListener("close", () => {
      if (dialog.returnValue === "start") this.start(this.#choice);
      dialog.returnValue = "";
    });
    dialog.querySelector("#walk").addEventListener("change", ({ target }) => {
      dialog.close();
      if (target.files.length) onWalk(target.files[0]);
      target.value = "";
    });
    this.#takePastes();
    this.#takeDrops();
  }

  /** Shows the server's images, the first one chosen, and a tile for a file of one's own. */
  fill(gallery) {
    this.gallery = gallery;
    this.#choice = gallery[0]?.name ?? "sample";
    const tiles = gallery.map(({ name, url, prompt }, index) => {
      const tile = document.createElement("label");
      const radio = Object.assign(document.createElement("input"), {
        type: "radio", name: "image", value: name, checked: index === 0,
      });
      const image = Object.assign(document.createElement("img"), { src: url, alt: prompt || name });
      radio.addEventListener("change", () => this.#choose(name, prompt));
      tile.append(radio, image);
      return tile;
    });
    const own = document.createElement("label");
    own.className = "own";
    const file = Object.assign(document.createElement("input"), {
      type: "file", accept: "image/*", id: "upload",
    });
    file.addEventListener("change", () => {
      if (file.files.length) this.#take(file.files[0], own);
      file.value = "";
    });
    own.append(file, "Your image");
    this.images.replaceChildren(...tiles, own);
  }

  /** Opens the dialog with the values in force. */
  open(prompt, seed) {
    this.problem.hidden = true;
    this.prompt.value = prompt;
    this.seed.value = seed;
    this.dialog.showModal();
  }

  start(image) {
    this.onStart({ image, prompt: this.prompt.value.trim() || null, seed: Number(this.seed.value) });
  }

  #choose(name, prompt) {
    this.#choice = name;
    if (prompt) this.prompt.value = prompt;
  }

  /** Uploads an image and shows it as the chosen tile. */
  async #take(file, tile) {
    this.problem.hidden = true;
    tile.classList.add("busy");
    try {
      this.#choice = await this.upload(file);
      const image = document.createElement("canvas");
      const bitmap = await createImageBitmap(file);
      const width = 160, height = Math.round((width * bitmap.height) / bitmap.width);
      Object.assign(image, { width, height });
      image.getContext("2d").drawImage(bitmap, 0, 0, width, height);
      tile.querySelector("canvas")?.remove();
      tile.append(image);
      tile.classList.add("chosen");
      for (const radio of this.images.querySelectorAll("[type=radio]")) radio.checked = false;
    } catch (error) {
      this.problem.textContent = error.message;
      this.problem.hidden = false;
    } finally {
      tile.classList.remove("busy");
    }
  }

  /** Takes an image or a shared walk from anywhere on the page. */
  async takeFile(file) {
    if (!file.type.startsWith("image/")) {
      this.onWalk(file);
    } else if (this.dialog.open) {
      await this.#take(file, this.images.querySelector(".own"));
    } else {
      this.onStart({ image: await this.upload(file), prompt: null, seed: 0 });
    }
  }

  #takePastes() {
    addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
      if (!file) return;
      event.preventDefault();
      this.#attempt(file);
    });
  }

  #takeDrops() {
    const carries = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragover", (event) => {
      if (!carries(event)) return;
      event.preventDefault();
      document.body.classList.add("dropping");
    });
    addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) document.body.classList.remove("dropping");
    });
    addEventListener("drop", (event) => {
      document.body.classList.remove("dropping");
      if (!carries(event) || !event.dataTransfer.files.length) return;
      event.preventDefault();
      this.#attempt(event.dataTransfer.files[0]);
    });
  }

  #attempt(file) {
    this.takeFile(file).catch(({ message }) => this.dialog.dispatchEvent(
      new CustomEvent("problem", { detail: message, bubbles: true })));
  }
}
