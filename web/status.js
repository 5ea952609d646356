// Live status on the node that samples: step, seconds a step, expert, skipped passes, memory, GPUs of a pool. Plain JavaScript.
// It draws on classic nodes and on Vue nodes. Where the page lacks what it needs it does nothing, and says so once in
// the console; the text that the server itself puts on nodes is there in any case.

const EVENT = "wan_fp8.status";
const SETTING = "WanFP8.LiveStatus";
const CANCEL = "WanFP8.Cancel";

/** One line for a status as the server sends it; what is null is left out. */
export function statusLine(status) {
  const parts = [`${status.step}/${status.steps}`];
  if (status.seconds_per_step != null) {
    const seconds = status.seconds_per_step;
    parts.push(`${seconds < 10 ? seconds.toFixed(2) : seconds.toFixed(0)} s/it`);
    const left = Math.round(seconds * (status.steps - status.step));
    if (left > 0) parts.push(left < 90 ? `${left} s left` : `${Math.round(left / 60)} min left`);
  }
  if (status.expert) parts.push(status.expert);
  if (status.skipped != null) parts.push(`${status.skipped} passes skipped`);
  if (status.memory_gib != null) parts.push(`${status.memory_gib.toFixed(1)} GiB${status.gpus > 1 ? " on the fullest" : ""}`);
  if (status.gpus > 1) parts.push(`${status.gpus} GPUs`);
  return parts.join(" · ");
}

/** The lines by node id, and how they reach the screen. */
export class StatusBoard {
  constructor(app) {
    this.app = app;
    this.lines = new Map();
    this.promptId = null;
    this.stopping = false;
  }

  show(node, text) {
    this.lines.set(String(node), text);
    this.redraw();
  }

  /** A new run begins, or one ended: what was said is no longer true. */
  clear() {
    this.lines.clear();
    this.stopping = false;
    document.querySelectorAll(".wan-fp8-status").forEach((element) => element.remove());
    this.redraw();
  }

  redraw() {
    for (const [node, text] of this.lines) this.drawOnVueNode(node, text);
    this.app.graph?.setDirtyCanvas?.(true, false);
  }

  /** Vue nodes are elements of the page that carry their node's id; there is none in classic drawing. */
  drawOnVueNode(node, text) {
    const home = document.querySelector(`[data-node-id="${CSS.escape(node)}"]`);
    if (!home) return;
    let line = home.querySelector(":scope > .wan-fp8-status");
    if (!line) {
      line = document.createElement("div");
      line.className = "wan-fp8-status";
      Object.assign(line.style, {
        position: "absolute",
        left: "0",
        bottom: "100%",
        marginBottom: "26px",
        padding: "2px 8px",
        borderRadius: "6px",
        font: "12px sans-serif",
        whiteSpace: "nowrap",
        pointerEvents: "none",
        color: "#f2f5fa",
        background: "#12161fdd",
      });
      home.append(line);
    }
    line.textContent = text;
  }

  /** Classic nodes are drawn on the canvas; ``context`` has the node's own coordinates, the title lies above 0. */
  drawOnCanvas(node, context) {
    const text = this.lines.get(String(node.id));
    if (!text || node.flags?.collapsed || document.querySelector(`[data-node-id="${CSS.escape(String(node.id))}"]`)) return;
    context.save();
    context.font = "12px sans-serif";
    const width = context.measureText(text).width + 16;
    const top = -(window.LiteGraph?.NODE_TITLE_HEIGHT ?? 30) - 26;
    context.fillStyle = "#12161fdd";
    context.beginPath();
    if (context.roundRect) context.roundRect(0, top, width, 20, 6);
    else context.rect(0, top, width, 20);
    context.fill();
    context.fillStyle = "#f2f5fa";
    context.textAlign = "left";
    context.fillText(text, 8, top + 14);
    context.restore();
  }
}

function isOn(app) {
  return app.extensionManager?.setting?.get?.(SETTING) ?? true;
}

function register(app, api) {
  const board = new StatusBoard(app);
  api.addEventListener(EVENT, (event) => {
    if (!isOn(app) || !event.detail?.node) return;
    board.promptId = event.detail.prompt_id;
    if (board.stopping) return; // the step that was under way when the user cancelled
    board.show(event.detail.node, statusLine(event.detail));
  });
  for (const end of ["execution_start", "execution_success", "execution_error", "execution_interrupted"]) {
    api.addEventListener(end, () => board.clear());
  }
  app.registerExtension({
    name: "WanFP8.Status",
    settings: [
      {
        id: SETTING,
        name: "Live status on Wan2.2 samplers",
        tooltip: "Step, seconds a step, expert, skipped passes, memory and GPUs of a pool above the node that runs.",
        category: ["Wan FP8", "Status", "Live status"],
        type: "boolean",
        defaultValue: true,
        onChange: (on) => on || board.clear(),
      },
    ],
    commands: [
      {
        id: CANCEL,
        label: "Wan FP8: cancel the running prompt",
        icon: "pi pi-times",
        function: async () => {
          board.stopping = board.lines.size > 0;
          for (const node of board.lines.keys()) board.show(node, "stopping …");
          try {
            await api.interrupt(board.promptId);
          } catch (error) {
            board.stopping = false; // the run goes on, and says so
            throw error;
          }
        },
      },
    ],
    nodeCreated(node) {
      if (!node.comfyClass?.startsWith?.("WanFP8Sample")) return;
      const before = node.onDrawForeground;
      node.onDrawForeground = function (context, ...rest) {
        const result = before?.call(this, context, ...rest);
        board.drawOnCanvas(this, context);
        return result;
      };
    },
  });
  return board;
}

/** Undefined where the page has no such interface. */
async function start() {
  try {
    const [{ app }, { api }] = await Promise.all([import("../../scripts/app.js"), import("../../scripts/api.js")]);
    return register(app, api);
  } catch (error) {
    console.info("Wan FP8: no live status on nodes,", error);
    return undefined;
  }
}

export const board = await start();
