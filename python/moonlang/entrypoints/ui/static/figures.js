// From totals that the server counts to rates and distributions of the last minutes. All memory here is bounded.

const SLOT_S = 5;
const SLOTS = 60; // five minutes
const POINTS = 120; // of the throughput chart
const MOST_KNOWN = 1024; // instances times processes

/** Counts per bucket over the last five minutes. */
class Recent {
  constructor(buckets) {
    this.slots = Array.from({ length: SLOTS }, () => new Float64Array(buckets));
    this.newest = 0;
  }

  add(bucket, count, time_s) {
    const slot = Math.floor(time_s / SLOT_S);
    const stale = Math.min(SLOTS, Math.max(0, slot - this.newest));
    for (let step = 1; step <= stale; step += 1) this.slots[(slot - stale + step) % SLOTS].fill(0);
    this.newest = Math.max(this.newest, slot);
    this.slots[slot % SLOTS][bucket] += count;
  }

  sums() {
    const sums = new Float64Array(this.slots[0].length);
    for (const slot of this.slots) for (let i = 0; i < sums.length; i += 1) sums[i] += slot[i];
    return sums;
  }
}

/** What was counted before, per instance: a total that shrinks belongs to a successor of the one that was there. */
class Before {
  constructor() {
    this.known = new Map();
  }

  /** The growth of each value since the last call for `id`; null at the first. */
  growth(id, values) {
    const old = this.known.get(id);
    this.known.delete(id); // so that the oldest come first
    this.known.set(id, values);
    if (old === undefined || old.length !== values.length) return null;
    return values.map((value, at) => (value >= old[at] ? value - old[at] : value));
  }

  /** Forget instances that are not there any more, and of the others the processes that have long been silent. */
  keep(ids) {
    for (const name of this.known.keys()) if (!ids.has(name.split(" ")[0])) this.known.delete(name);
    while (this.known.size > MOST_KNOWN) this.known.delete(this.known.keys().next().value);
  }
}

export class Figures {
  constructor() {
    this.totals = new Before();
    this.counts = { ttft_s: new Before(), itl_s: new Before() };
    this.recent = { ttft_s: null, itl_s: null };
    this.bounds = [];
    this.time_s = 0;
    this.output = []; // tokens per second, newest last
    this.prompt = [];
    this.rates = new Map(); // by instance: {output, prompt, moved}
  }

  /** Take one state of the server. */
  take(state) {
    const passed = state.time_s - this.time_s;
    this.time_s = state.time_s;
    this.bounds = state.bounds.seconds ?? this.bounds;
    this.rates.clear();
    let output = 0;
    let prompt = 0;
    for (const instance of state.instances) {
      if (!instance.load) continue;
      const rate = this.rateOf(instance, passed);
      this.rates.set(instance.id, rate);
      if (instance.kind !== "prefill") output += rate.output;
      prompt += rate.prompt;
      if (instance.kind !== "prefill" && instance.figures) this.countLatencies(instance);
    }
    const ids = new Set(state.instances.map((instance) => instance.id));
    for (const before of [this.totals, ...Object.values(this.counts)]) before.keep(ids);
    push(this.output, output);
    push(this.prompt, prompt);
  }

  rateOf({ id, kind, load }, passed) {
    const computed = load.total_prompt_tokens - load.total_cached_tokens;
    const values = [load.total_output_tokens, computed, load.pairs.total_moved_bytes];
    const growth = this.totals.growth(id, values);
    if (growth === null || passed <= 0) return { output: 0, prompt: 0, moved: 0 };
    const [output, prompt, moved] = growth.map((grown) => grown / passed);
    return { output, prompt: kind === "decode" ? 0 : prompt, moved };
  }

  countLatencies({ id, process, figures }) {
    for (const name of Object.keys(this.counts)) {
      const counts = figures[name].counts;
      const growth = this.counts[name].growth(`${id} ${process}`, counts);
      if (this.recent[name]?.slots[0].length !== counts.length) this.recent[name] = new Recent(counts.length);
      growth?.forEach((count, bucket) => count && this.recent[name].add(bucket, count, this.time_s));
    }
  }

  /** Counts per bucket of the last five minutes. */
  latencies(name) {
    const recent = this.recent[name];
    if (recent === null) return new Float64Array(0);
    recent.add(0, 0, this.time_s);
    return recent.sums();
  }
}

function push(list, value) {
  list.push(value);
  if (list.length > POINTS) list.shift();
}

/** The value below which a share of what was counted lies, interpolated within its bucket; NaN when nothing was. */
export function quantile(counts, bounds, share) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  let left = share * total;
  for (let i = 0; i < counts.length && total; i += 1) {
    if (left <= counts[i] && counts[i]) {
      const low = i ? bounds[i - 1] : 0;
      const high = bounds[Math.min(i, bounds.length - 1)];
      return low + (high - low) * (left / counts[i]);
    }
    left -= counts[i];
  }
  return NaN;
}
