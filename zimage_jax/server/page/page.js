// What the browser does itself: paint a mask, show the memory, tell which button was pressed.
window.zimage = (() => {
  const words = /* words */;
  const language = navigator.language.slice(0, 2).toLowerCase();
  const word = (key) => (words[language] ?? words.en)[key] ?? key;
  const translate = (root) => {
    for (const node of root.querySelectorAll("[data-word]")) node.textContent = word(node.dataset.word);
  };
  const read = (file) => new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  const size = (bytes) => bytes >= 0.1 * 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(2)} GiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;

  // A file that is chosen, dropped or pasted.
  function onFile(root, take) {
    const input = root.querySelector("input[type=file]");
    input.addEventListener("change", () => { if (input.files[0]) take(input.files[0]); input.value = ""; });
    for (const name of ["dragenter", "dragover"]) {
      root.addEventListener(name, (event) => { event.preventDefault(); root.classList.add("z-over"); });
    }
    for (const name of ["dragleave", "drop"]) root.addEventListener(name, () => root.classList.remove("z-over"));
    root.addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
    });
    root.addEventListener("paste", (event) => {
      if (event.clipboardData.files[0]) take(event.clipboardData.files[0]);
    });
  }

  // The picture to begin from, and over it a mask of the picture's size: what is painted is redrawn.
  let picture = null;
  let isPainted = false;
  let maskCanvas = null;

  function canvas(root, trigger) {
    translate(root);
    const stage = root.querySelector(".z-stage");
    const image = root.querySelector("img");
    const paint = maskCanvas = root.querySelector("canvas");
    const brush = root.querySelector("input[type=range]");
    const pen = paint.getContext("2d");
    const clear = () => { pen.clearRect(0, 0, paint.width, paint.height); isPainted = false; };
    const show = () => { root.classList.toggle("z-filled", picture !== null); };
    onFile(root, async (file) => {
      const data = await read(file);
      image.onload = () => {
        [paint.width, paint.height] = [image.naturalWidth, image.naturalHeight];
        picture = data;
        isPainted = false;
        show();
        trigger("change", { width: image.naturalWidth, height: image.naturalHeight });
      };
      image.onerror = () => trigger("change", { width: 0, height: 0 });
      image.src = data;
    });
    root.querySelector(".z-without").addEventListener("click", () => {
      picture = null;
      clear();
      show();
      trigger("clear");
    });
    root.querySelector(".z-clear").addEventListener("click", clear);
    let last = null;
    const at = (event) => {
      const box = paint.getBoundingClientRect();
      const scale = paint.width / box.width;
      return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale, brush.value * scale];
    };
    const stroke = (event) => {
      const [x, y, width] = at(event);
      Object.assign(pen, { strokeStyle: "#fff", lineCap: "round", lineJoin: "round", lineWidth: width });
      pen.beginPath();
      pen.moveTo(...(last ?? [x, y]));
      pen.lineTo(x, y);
      pen.stroke();
      last = [x, y];
      isPainted = true;
    };
    paint.addEventListener("pointerdown", (event) => { paint.setPointerCapture(event.pointerId); last = null; stroke(event); });
    paint.addEventListener("pointermove", (event) => { if (event.buttons) stroke(event); });
    stage.addEventListener("touchmove", (event) => event.preventDefault(), { passive: false });
  }

  // What the draw button sends beside the form: the file as it is, and the mask, white on black.
  function chosen() {
    if (picture === null) return "";
    if (!isPainted) return JSON.stringify({ image: picture });
    const mask = document.createElement("canvas");
    [mask.width, mask.height] = [maskCanvas.width, maskCanvas.height];
    const pen = mask.getContext("2d");
    pen.fillRect(0, 0, mask.width, mask.height);
    pen.drawImage(maskCanvas, 0, 0);
    return JSON.stringify({ image: picture, mask: mask.toDataURL("image/png") });
  }

  function reuse(root, trigger) {
    translate(root);
    onFile(root, async (file) => trigger("upload", { file: await read(file), name: file.name }));
  }

  function actions(root, trigger) {
    root.addEventListener("click", (event) => {
      const button = event.target.closest("button[data-act]");
      if (button) trigger("click", { ...button.dataset });
    });
  }

  // A strip of what is on the device, a part per array, as wide as the budget. Each second.
  function memory(root) {
    translate(root);
    const bar = root.querySelector(".z-strip");
    const text = root.querySelector(".z-legend");
    const draw = (found) => {
      const arrays = Object.entries(found.device.arrays).filter(([, bytes]) => bytes > 0);
      const now = found.device.now_bytes;
      const budget = found.plan?.budget_bytes || Math.max(now, 1);
      const whole = Math.max(budget, now);
      bar.replaceChildren(...arrays.map(([name, bytes], index) => {
        const part = document.createElement("div");
        part.style.width = `${100 * bytes / whole}%`;
        part.style.background = `hsl(${(index * 67 + 210) % 360} 60% 55%)`;
        part.title = `${name}: ${size(bytes)}`;
        part.textContent = bytes > whole / 8 ? name : "";
        return part;
      }));
      bar.setAttribute("aria-label", arrays.map(([name, bytes]) => `${name} ${size(bytes)}`).join(", "));
      const peaks = Object.entries(found.device.peak_bytes_by_stage).map(([stage, bytes]) => `${stage} ${size(bytes)}`);
      const streams = Object.entries(found.plan?.streams ?? {}).map(([stage, of]) =>
        `${stage} ${size(of.resident_bytes)} ${word("resident")}, ${size(of.streamed_bytes)} ${word("streams")}`);
      const cards = found.nvidia.map((card) => `${card.name} ${size(card.used_bytes)} / ${size(card.total_bytes)}`);
      text.replaceChildren(...[
        `${size(now)} / ${size(budget)}`,
        peaks.length ? `${word("peak")}: ${peaks.join(", ")}` : "",
        streams.join("; "),
        ...cards,
      ].filter(Boolean).map((line) => Object.assign(document.createElement("p"), { textContent: line })));
    };
    const tick = async () => {
      if (!root.isConnected) return;
      if (!document.hidden) {
        try {
          const answer = await fetch("/memory");
          if (answer.ok) draw(await answer.json());
          else text.textContent = word("offline");
        } catch { text.textContent = word("offline"); }
      }
      setTimeout(tick, 1000);
    };
    tick();
  }

  return { actions, canvas, chosen, memory, reuse };
})();
