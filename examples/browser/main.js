// The page: what is typed goes to the worker, what comes back is shown.
const $ = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });

const LABELS = { loading: "Loading", ready: "Write", writing: "Stop", done: "Write", problem: "Write" };

function enter(state) {
  document.body.dataset.state = state;
  $("go").textContent = LABELS[state];
  $("go").disabled = state === "loading" || state === "problem";
}

const megabytes = (bytes) => `${Math.round(bytes / 1e6)} MB`;

const ON = {
  progress({ received, total }) {
    $("progress").value = received / total;
    $("size").textContent = `${Math.round(received / 1e6)} of ${megabytes(total)}`;
    if (received === total) $("progress").removeAttribute("value"); // onnxruntime reads it
  },
  ready({ bytes, device, threads }) {
    $("progress").hidden = true;
    $("size").textContent = megabytes(bytes);
    $("device").textContent = device === "webgpu" ? "WebGPU" : `CPU \u00d7 ${threads}`;
    enter("ready");
  },
  text({ text, speed, first }) {
    $("written").textContent = text;
    $("first").textContent = `${Math.round(first)} ms`;
    if (speed > 0) $("speed").textContent = speed.toFixed(1);
  },
  done: () => enter("done"),
  problem({ message }) {
    $("progress").hidden = true;
    $("problem").hidden = false;
    $("problem").textContent = message;
    enter("problem");
  },
};

worker.onmessage = ({ data }) => ON[data.kind](data);
worker.onerror = ({ message }) => ON.problem({ message: message ?? "worker.js or a package of it is missing" });

$("form").onsubmit = (event) => {
  event.preventDefault();
  if (document.body.dataset.state === "writing") return worker.postMessage("stop");
  const prompt = $("prompt").value.trim();
  $("text").hidden = false;
  $("given").textContent = prompt;
  $("written").textContent = "";
  worker.postMessage({ prompt, tokens: $("tokens").valueAsNumber });
  enter("writing");
};

enter("loading");
