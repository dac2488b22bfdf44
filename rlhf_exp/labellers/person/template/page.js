"use strict";
// Shows pairs and sends what is said of them. Texts come from models: they are set as text only.
const at = (id) => document.getElementById(id);
const pause = (ms) => new Promise((resume) => setTimeout(resume, ms));
const fresh = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
const WORDS = { left: "1 is better", right: "2 is better", tie: "Tie", skip: "Skipped" };
const UNASKED = 400; // ms in which a choice may still mean the pair that was on the screen before
const KEYS = { 1: "left", 2: "right", 0: "tie", s: "skip" };
const REST = {
  mine: ["Your part is done", "Others still have pairs in hand. If one comes free, it appears here."],
  waiting: ["All done for now", "The run goes on. If it has more to ask, the next pair appears here by itself."],
  finished: ["Labelling is finished", "The run goes on with what is labelled. You can close this page."],
  gone: ["The run does not answer", "It has ended, or was stopped. What was saved is kept; if it is started again, open the address that it prints."],
};

let who = decodeURIComponent((document.cookie.match(/(?:^|; )labeller=([^;]*)/) || [])[1] || "");
let state = null; // what the run said last
let pairs = []; // the one on the screen, and the next
let current = null;
let since = 0; // when it was shown
let ready = 0; // when choices count again
let count = 0; // labels of this session
let gone = false;
let busy = 0; // requests that were not answered yet
let chain = Promise.resolve(); // they go one after the other
const answered = new Set(); // keys that were sent, and not acknowledged yet

// ---- requests

class Refused extends Error {}

async function delivered(what, body) {
  for (let tries = 1; ; tries += 1) {
    try {
      const headers = { "Content-Type": "application/json" };
      const answer = await fetch(what, { method: "POST", headers, body, keepalive: true });
      const told = answer.status < 500 ? await answer.json() : null;
      if (told) gone = false;
      if (told && !answer.ok) throw new Refused(told.error);
      if (told) return told;
    } catch (error) {
      if (error instanceof Refused) throw error;
    }
    if (tries > 1) {
      gone = true;
      show();
    }
    await pause(1000);
  }
}

function send(what, body = {}) {
  busy += 1;
  const request = JSON.stringify({ ...body, who });
  chain = chain
    .then(() => delivered(what, request))
    .then(
      (told) => {
        acknowledged(body, !told.closed);
        heard(told);
      },
      (error) => {
        acknowledged(body, false);
        say(`Not saved: ${error.message}`);
        show();
      },
    )
    .finally(() => {
      busy -= 1;
    });
}

function acknowledged(body, saved) {
  answered.delete(body.key);
  if (body.choice && !saved) count = Math.max(0, count - 1);
}

function heard(told) {
  state = told;
  if (told.undone) {
    current = null;
    count = Math.max(0, count - 1);
    say("Taken back");
  } else if (told.undone === null) say("Nothing to take back");
  if (told.closed) say("That round is over");
  pairs = told.pairs.filter((pair) => !answered.has(pair.key));
  show();
}

// ---- what is on the screen

function show() {
  const next = gone ? null : pairs.find((pair) => current && pair.key === current.key) || pairs[0] || null;
  if (next && (!current || next.key !== current.key)) {
    ready = performance.now() + (current ? UNASKED : 0); // after one's own action there is none
    present(next);
  }
  current = next;
  at("pair").hidden = !next;
  at("rest").hidden = Boolean(next);
  for (const button of at("choices").children) button.disabled = !next;
  at("undo").disabled = gone || !state || !state.asking;
  at("finish").disabled = gone || !state || !state.asking;
  if (!state && !gone) return;
  if (!next) {
    const mine = state && state.asking && state.done < state.asked;
    const rest = gone ? "gone" : state.finished ? "finished" : mine ? "mine" : "waiting";
    if (gone || busy <= 1) [at("what").textContent, at("why").textContent] = REST[rest];
  }
  if (state) progress();
}

function present(pair) {
  for (const part of ["prompt", "left", "right"]) {
    at(part).textContent = pair[part];
    at(part).scrollTop = 0;
  }
  scrollTo({ top: 0 });
  at("pair").classList.remove("fresh");
  void at("pair").offsetWidth; // so that the animation begins anew
  at("pair").classList.add("fresh");
  since = performance.now();
}

function progress() {
  const { done, asked, others } = state;
  at("bar").max = Math.max(1, asked);
  at("bar").value = done;
  at("progress").textContent = `${done} of ${asked}` + (count ? ` · ${count} by you now` : "");
  at("others").textContent = others ? `${others} other${others > 1 ? "s" : ""} labelling` : "";
  at("name").textContent = who;
  document.title = state.asking ? `${done}/${asked} Which is better?` : "Which is better?";
}

let fading = 0;
function say(text, undoable = false) {
  at("said").textContent = text;
  at("back").hidden = !undoable;
  at("toast").hidden = false;
  clearTimeout(fading);
  fading = setTimeout(() => {
    at("toast").hidden = true;
  }, 3500);
}

// ---- what a person does

function choose(choice) {
  if (!current || gone || at("who").open || performance.now() < ready) return;
  const { key } = current;
  const seconds = Math.round(performance.now() - since) / 1000;
  answered.add(key);
  count += 1;
  pairs = pairs.filter((pair) => pair.key !== key);
  current = null;
  send("label", { key, choice, seconds, id: fresh() });
  say(WORDS[choice], true);
  show();
}

function undo() {
  if (!at("undo").disabled) send("undo", { id: fresh() });
}

function askWho() {
  at("given").value = who;
  at("who").showModal();
}

for (const button of at("choices").children) {
  button.addEventListener("click", () => choose(button.dataset.choice));
}
at("undo").addEventListener("click", undo);
at("back").addEventListener("click", undo);
at("name").addEventListener("click", askWho);
at("finish").addEventListener("click", () => at("sure").showModal());
at("stay").addEventListener("click", () => at("sure").close());
at("sure").addEventListener("submit", () => send("finish"));
at("who").addEventListener("cancel", (event) => who || event.preventDefault());
at("who").addEventListener("submit", (event) => {
  const name = at("given").value.trim();
  if (!name) return event.preventDefault();
  if (name !== who) [pairs, current] = [[], null];
  who = name;
  document.cookie = `labeller=${encodeURIComponent(name)};path=/;max-age=31536000;SameSite=Strict`;
  send("ask");
});
addEventListener("keydown", (event) => {
  const away = event.ctrlKey || event.metaKey || event.altKey || event.repeat;
  if (away || document.querySelector("dialog[open]")) return;
  const key = event.key.toLowerCase();
  if (key === "u") undo();
  else if (Object.hasOwn(KEYS, key)) choose(KEYS[key]);
});

// ---- begin, and look for what is new

function look() {
  if (who && busy === 0 && !document.hidden) send("ask");
}
document.addEventListener("visibilitychange", look);
setInterval(look, 2000);
if (who) send("ask");
else askWho();
