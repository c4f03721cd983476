// An explorer on a page: controls above a picture. `model` is a kernel's (anywidget) or `still`.
const CSS = `
  .gdviz { font: 0.85rem/1.5 system-ui, sans-serif }
  .gdviz .control { display: flex; flex-wrap: wrap; align-items: center; gap: 0.2em 0.8em }
  .gdviz .control > :first-child { width: 11em; text-align: right }
  .gdviz input[type=range] { width: 18em }
  .gdviz :focus-visible { outline: 2px solid #4a8cfa; outline-offset: 2px }
  .gdviz img { display: block; max-width: 100%; height: auto; width: auto }
  .gdviz.late img { opacity: 0.5 }`;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function render({ model, el }) {
  const controls = model.get("controls"), move = (k, to) => {
    model.set("at", model.get("at").with(k, to));
    model.save_changes();
    draw();
  };
  const follow = []; // each makes one control stand where the model does
  const timers = [];
  const form = make("form", { role: "group", "aria-label": model.get("title") });
  form.addEventListener("submit", (event) => event.preventDefault());
  // JupyterLab takes keys for its own: some would change the cell's type.
  el.dataset.lmSuppressShortcuts = "true";
  el.addEventListener("keydown", (event) => event.stopPropagation());

  controls.forEach(({ label, kind, texts }, k) => {
    if (kind === "buttons") {
      const buttons = texts.map((text, to) => {
        const button = make("input", { type: "radio", name: `control${k}` });
        button.addEventListener("change", () => move(k, to));
        return button;
      });
      const options = texts.map((text, to) => make("label", {}, buttons[to], ` ${text}`));
      const group = { class: "control", role: "radiogroup", "aria-label": label };
      form.append(make("div", group, make("span", {}, label), ...options));
      follow.push((to) => (buttons[to].checked = true));
      return;
    }
    const range = { type: "range", min: 0, max: texts.length - 1, "aria-label": label };
    const slider = make("input", range), value = make("span", { "aria-hidden": true });
    const say = (to) => { // the value, not its number in the list
      slider.setAttribute("aria-valuetext", texts[to]);
      value.textContent = texts[to];
    };
    slider.addEventListener("input", () => say(slider.valueAsNumber));
    slider.addEventListener(model.still ? "input" : "change", () => move(k, slider.valueAsNumber));
    const row = make("div", { class: "control" }, make("span", {}, label), slider, value);
    if (kind === "player") {
      const play = make("button", { type: "button", "aria-label": `play ${label}` }, "▶ play");
      let timer = null;
      play.addEventListener("click", () => {
        play.textContent = timer ? "▶ play" : "⏸ pause";
        play.setAttribute("aria-label", timer ? `play ${label}` : `pause ${label}`);
        timer = timer ? clearInterval(timer) : setInterval(() => {
          if (!late()) move(k, (model.get("at")[k] + 1) % texts.length);
        }, 125);
        timers[k] = timer;
      });
      row.append(play);
    }
    form.append(row);
    follow.push((to) => { // what plays must not take a slider out of the hand that drags it
      if (!slider.matches(":active")) { slider.value = to; say(to); }
    });
  });

  const readout = make("div", { role: "status" }), picture = make("img");
  const late = () => String(model.get("shown").at) !== String(model.get("at"));
  const draw = () => {
    const shown = model.get("shown");
    model.get("at").forEach((to, k) => follow[k](to));
    el.classList.toggle("late", late());
    readout.setAttribute("aria-live", timers.some(Boolean) ? "off" : "polite");
    if (late()) {
      readout.textContent = "drawing …";
      return;
    }
    readout.innerHTML = shown.readout;
    picture.src = shown.picture;
    picture.alt = shown.alt;
  };
  model.on("change:shown", draw);
  model.on("change:at", draw);
  el.classList.add("gdviz");
  el.replaceChildren(make("style", {}, CSS), form, readout, picture);
  draw();
  return () => timers.forEach(clearInterval);
}

// What a kernel does, done by a table of pictures, the last control's values next to each other.
function still(table) {
  let at = table.at;
  const row = () => at.reduce((sum, to, k) => sum * table.controls[k].texts.length + to, 0);
  return {
    get: (name) => ({ ...table, at, shown: { ...table.shown[row()], at } })[name],
    set: (_, to) => (at = to),
    on: () => {},
    save_changes: () => {},
    still: true,
  };
}
