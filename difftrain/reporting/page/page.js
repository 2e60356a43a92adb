"use strict";
// Reads values, switches lines, axes and smoothing. Everything it shows was drawn before: without it the page still reads.
(() => {
  const all = JSON.parse(document.getElementById("data").textContent);
  const { left, right, top, bottom } = all.box;
  const text = (value) => {
    const size = Math.abs(value);
    if (size >= 1e4 && size < 1e15) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(4)));
  };
  let smoothing = 0;

  // Exponential mean, each value counted by how many came before it, so that the first ones are not pulled to 0.
  function smooth(values) {
    let mean = 0, weight = 0;
    return values.map((value) => {
      mean = smoothing * mean + (1 - smoothing) * value;
      weight = smoothing * weight + (1 - smoothing);
      return mean / weight;
    });
  }

  class Picture {
    constructor(figure, data) {
      Object.assign(this, { figure, data, isLog: false, at: null });
      this.svg = figure.querySelector("svg");
      this.readout = figure.querySelector(".readout");
      this.cursor = figure.querySelector(".cursor");
      this.groups = data.lines.map((_, i) => figure.querySelector(`g[data-line="${i}"]`));
      this.isOff = data.lines.map(() => false);
      this.values = data.lines.map((line) => line.values);
      this.svg.addEventListener("pointermove", (event) => this.point(event));
      this.svg.addEventListener("pointerleave", () => this.leave());
      this.svg.addEventListener("blur", () => this.leave());
      this.svg.addEventListener("keydown", (event) => this.key(event));
      for (const button of figure.querySelectorAll(".legend button"))
        button.addEventListener("click", () => this.toggle(button));
      const scale = figure.querySelector(".scale");
      if (scale) {
        scale.hidden = false;
        scale.addEventListener("click", () => {
          this.isLog = !this.isLog;
          scale.setAttribute("aria-pressed", this.isLog);
          figure.classList.toggle("is-log", this.isLog);
          this.draw();
        });
      }
    }

    x(step) {
      const [low, high] = this.data.x;
      return left + ((step - low) / (high - low)) * (right - left);
    }

    y(value) {
      const [low, high] = this.isLog ? this.data.log : this.data.y;
      const share = this.isLog ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
      return bottom - share * (bottom - top);
    }

    draw() {
      if (this.data.stacked) return;
      this.data.lines.forEach((line, i) => {
        this.values[i] = line.smooth && smoothing ? smooth(line.values) : line.values;
        const places = line.steps.map((step, k) => `${this.x(step).toFixed(1)} ${this.y(this.values[i][k]).toFixed(1)}`);
        this.groups[i].querySelector(".stroke").setAttribute("d", `M${places.join("L")}`);
        const dots = this.groups[i].querySelector(".dots");
        if (dots) dots.setAttribute("d", places.map((place) => `M${place}h0`).join(""));
      });
      if (this.at !== null) this.read(this.at);
    }

    toggle(button) {
      const i = Number(button.dataset.line);
      this.isOff[i] = !this.isOff[i];
      button.setAttribute("aria-pressed", !this.isOff[i]);
      this.groups[i].classList.toggle("is-off", this.isOff[i]);
    }

    // The steps at which any line that is shown has a value.
    steps() {
      const seen = new Set();
      this.data.lines.forEach((line, i) => this.isOff[i] || line.steps.forEach((step) => seen.add(step)));
      return [...seen].sort((a, b) => a - b);
    }

    point(event) {
      const box = this.svg.getBoundingClientRect();
      const place = ((event.clientX - box.left) / box.width) * this.svg.viewBox.baseVal.width;
      const steps = this.steps();
      if (steps.length) this.read(steps.reduce((a, b) => (Math.abs(this.x(b) - place) < Math.abs(this.x(a) - place) ? b : a)));
    }

    key(event) {
      const steps = this.steps();
      if (!steps.length) return;
      const here = this.at === null ? -1 : steps.findIndex((step) => step >= this.at);
      const page = Math.max(1, Math.round(steps.length / 10));
      const last = steps.length - 1;
      const moves = { ArrowRight: here + 1, ArrowLeft: here < 0 ? last : here - 1, PageDown: here + page, PageUp: here - page, Home: 0, End: last };
      if (event.key === "Escape") return this.leave();
      if (!(event.key in moves)) return;
      event.preventDefault();
      this.read(steps[Math.min(Math.max(moves[event.key], 0), last)]);
    }

    // Of each line the value at this step, or its last one before it.
    read(step) {
      this.at = step;
      const parts = [];
      this.data.lines.forEach((line, i) => {
        if (this.isOff[i]) return;
        let k = line.steps.length - 1;
        while (k > 0 && line.steps[k] > step) k--;
        if (line.steps[k] > step) return;
        const when = line.steps[k] < step ? ` (step ${line.steps[k].toLocaleString("en")})` : "";
        parts.push([line.label, text(this.values[i][k]), when]);
      });
      if (this.data.stacked) parts.reverse();
      const first = document.createElement("b");
      first.textContent = `step ${step.toLocaleString("en")}: `;
      this.readout.replaceChildren(first);
      parts.forEach(([label, value, when], i) => {
        const strong = document.createElement("b");
        strong.textContent = value;
        this.readout.append(`${i ? " · " : ""}${label} `, strong, when);
      });
      for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, this.x(step));
      this.figure.classList.add("is-read");
    }

    leave() {
      this.at = null;
      this.figure.classList.remove("is-read");
      this.readout.textContent = this.data.note;
    }
  }

  const pictures = all.pictures.map((data) => new Picture(document.getElementById(`picture-${data.id}`), data));
  document.querySelector(".controls").hidden = false;
  document.getElementById("smoothing").addEventListener("input", (event) => {
    smoothing = Number(event.target.value);
    pictures.forEach((picture) => picture.draw());
  });
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
  });
  // On paper the tables are open.
  addEventListener("beforeprint", () => document.querySelectorAll("figure details").forEach((each) => { each.open = true; }));
})();
