/**
 * The files of a bundle: fetched once, checked by the manifest's digests, and kept by the browser under them.
 *
 *     manifest.json ──► names, sizes, SHA-256 ──► Cache API, or the network ──► bytes whose digest is right
 *
 * A file is asked for over the network only when the cache has none of its digest, so a bundle that changed loads what
 * changed, and one that is there loads with no network at all. Files that a new manifest does not name are removed.
 * Where there is no secure context (HTTPS or this machine itself) browsers have neither digests nor caches: see `secure`.
 */

export class EdgePeftError extends Error {
  name = "EdgePeftError";
}

const ADAPTERS = "adapters/";
const AGAIN = "Copy or build the bundle again.";
const DIGEST = /"digest": "([0-9a-f]{64})"/;

/** Tell whether this page may use digests, caches and WebGPU. */
export const secure = () => Boolean(globalThis.isSecureContext && globalThis.crypto?.subtle && globalThis.caches);

async function sha256(bytes) {
  const found = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(found, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Files {
  /** url: the bundle's folder. */
  constructor(url) {
    this.base = new URL(url, globalThis.location?.href);
    if (!this.base.pathname.endsWith("/")) this.base.pathname += "/";
    this.notes = [];
  }

  /** Read and check the manifest; without a network, the one that was read last. */
  async open() {
    this.cache = secure() ? await caches.open(`edgepeft:${this.base.href}`) : null;
    if (!this.cache) this.notes.push("neither checked nor kept: that takes HTTPS, or a page from this machine");
    const url = this.#url("manifest.json");
    const { bytes, kept } = await this.#newest(url);
    const text = new TextDecoder().decode(bytes);
    await this.#checkSeal(text);
    this.manifest = JSON.parse(text);
    if (this.manifest.schema !== 1) {
      throw new EdgePeftError(`${url}: schema ${this.manifest.schema}, this page reads 1. Build both by one edgepeft.`);
    }
    if (!kept) await this.#keep(url, bytes);
    await this.#prune();
    return this.manifest;
  }

  has(name) {
    return name in this.manifest.files;
  }

  /**
   * Return {name: Uint8Array} of files that the manifest names. progress({file, loaded, total}) is called with bytes of
   * all of them. Throws EdgePeftError for a file that is missing or is not the one that the manifest names.
   */
  async read(names, progress = () => {}) {
    const total = names.reduce((sum, name) => sum + this.manifest.files[name].bytes, 0);
    const out = {};
    let before = 0;
    for (const name of names) {
      out[name] = await this.#checked(name, (count) => progress({ file: name, loaded: before + count, total }));
      before += this.manifest.files[name].bytes;
      progress({ file: name, loaded: before, total });
    }
    return out;
  }

  /** Keep all adapters too, so that each can be taken without a network; resolves to whether they are. */
  async keep() {
    if (!this.cache) return false;
    try {
      for (const name of Object.keys(this.manifest.files).filter((name) => name.startsWith(ADAPTERS))) {
        if (!(await this.cache.match(this.#key(this.manifest.files[name].sha256)))) await this.read([name]);
      }
    } catch (error) {
      this.notes.push(`not all adapters are kept for later: ${error.message}`);
    }
    return !this.notes.length;
  }

  async json(name) {
    return JSON.parse(new TextDecoder().decode((await this.read([name]))[name]));
  }

  /** Return a file that the manifest does not name, as it is, or null where there is none. */
  async unnamed(name) {
    const answer = await fetch(this.#url(name)).catch(() => null);
    return answer?.ok ? new Uint8Array(await answer.arrayBuffer()) : null;
  }

  // --- how it is done ---

  #url(name) {
    return new URL(name, this.base).href;
  }

  #key(digest) {
    return this.#url(`.edgepeft/${digest}`);
  }

  async #newest(url) {
    let why;
    try {
      const answer = await fetch(url, { cache: "no-cache" });
      if (answer.ok) return { bytes: new Uint8Array(await answer.arrayBuffer()), kept: false };
      why = `the server answers ${answer.status}`;
    } catch (error) {
      why = error.message;
    }
    const kept = await this.cache?.match(url);
    if (kept) return { bytes: new Uint8Array(await kept.arrayBuffer()), kept: true };
    throw new EdgePeftError(`${url}: cannot be read (${why}). It is the folder that \`edgepeft build\` writes.`);
  }

  async #checkSeal(text) {
    if (!this.cache) return;
    const found = DIGEST.exec(text)?.[1];
    const blank = new TextEncoder().encode(text.replace(DIGEST, `"digest": "${"0".repeat(64)}"`));
    if (found !== (await sha256(blank))) {
      throw new EdgePeftError(`manifest.json was changed since the bundle was made. ${AGAIN}`);
    }
  }

  async #checked(name, progress) {
    const { sha256: wanted, bytes: size } = this.manifest.files[name];
    const kept = await this.cache?.match(this.#key(wanted));
    if (kept) {
      const bytes = new Uint8Array(await kept.arrayBuffer());
      if ((await sha256(bytes)) === wanted) return bytes;
      await this.cache.delete(this.#key(wanted));
    }
    const bytes = await this.#fetched(name, size, progress);
    if (bytes.length !== size) {
      throw new EdgePeftError(`${name} has ${bytes.length} bytes, expected ${size}. ${AGAIN}`);
    }
    if (this.cache) {
      const found = await sha256(bytes);
      if (found !== wanted) {
        const digests = `SHA-256 ${found.slice(0, 16)}…, expected ${wanted.slice(0, 16)}…`;
        throw new EdgePeftError(`${name} was changed: ${digests}. ${AGAIN}`);
      }
    }
    await this.#keep(this.#key(wanted), bytes);
    return bytes;
  }

  async #fetched(name, size, progress) {
    const answer = await fetch(this.#url(name), { cache: "no-store" }).catch((error) => {
      throw new EdgePeftError(`${name} cannot be read (${error.message}), and the browser has not kept it.`);
    });
    if (!answer.ok) throw new EdgePeftError(`${name} cannot be read: the server answers ${answer.status}. ${AGAIN}`);
    const out = new Uint8Array(size);
    let count = 0;
    for (const reader = answer.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) return out.subarray(0, count);
      if (count + value.length > size) {
        reader.cancel();
        throw new EdgePeftError(`${name} has more than its ${size} bytes. ${AGAIN}`);
      }
      out.set(value, count);
      count += value.length;
      progress(count);
    }
  }

  async #keep(key, bytes) {
    try {
      await this.cache?.put(key, new Response(bytes));
    } catch (error) {
      this.notes.push(`not kept for later: the browser has no room (${error.message})`);
    }
  }

  async #prune() {
    if (!this.cache) return;
    const named = new Set(Object.values(this.manifest.files).map((file) => this.#key(file.sha256)));
    named.add(this.#url("manifest.json"));
    for (const request of await this.cache.keys()) {
      if (!named.has(request.url)) await this.cache.delete(request);
    }
  }
}
