/**
 * A float adapter in 4-bit digits, as a token's shaders read it: `edgepeft.runtime.digits` over again, digit for digit.
 *
 *     A = A0 + A1 + A2, B alike    4 bits and a float32 scale for 32 columns each, the next of what the last left over
 *     columns (i, j) of A x go with Bj, those of one j together and filled to whole blocks
 */

export const DIGITS = 3;
export const BLOCK = 32;
const ZERO = 8; // the code of 0
const REACH = 7.5; // a block's largest value in units of its scale
const COUNTS = [3, 2, 1]; // of A's digits that go with B's first, second and third

const filled = (count) => Math.ceil(count / BLOCK) * BLOCK;

/** Return how many columns stand for some ranks, all digits together. */
export const columns = (ranks) => COUNTS.reduce((sum, count) => sum + filled(count * ranks), 0);

/** Round to the nearest whole number, halves to the even one. */
function rounded(value) {
  const near = Math.round(value);
  return near - value === 0.5 && near % 2 ? near - 1 : near;
}

/** Take a digit of each value out of Float64Array [rows, width], in place; write codes and scales at a place of each. */
function digit(left, codes, scales, at) {
  for (let block = 0; block * BLOCK < left.length; block++) {
    const values = left.subarray(block * BLOCK, (block + 1) * BLOCK);
    const top = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    const scale = top > 0 ? Math.fround(top / REACH) : 1;
    scales[at / BLOCK + block] = scale;
    for (let i = 0; i < BLOCK; i++) {
      const code = Math.min(Math.max(rounded(values[i] / scale), -ZERO), ZERO - 1);
      values[i] -= code * scale;
      codes[at + block * BLOCK + i] = code + ZERO;
    }
  }
}

/** Return {dims, data} of codes [n, k] as MatMulNBits reads them, two to a byte, and of their scales. */
function weights(codes, scales, n, k) {
  const data = new Uint8Array(codes.length / 2);
  for (let i = 0; i < data.length; i++) data[i] = codes[2 * i] | (codes[2 * i + 1] << 4);
  const blocks = k / BLOCK;
  return [{ dims: [n, blocks, BLOCK / 2], data }, { dims: [n, blocks], data: scales }];
}

/** Return [codes, scales] of A, numbers [ranks, k]. */
export function down(a, ranks, k) {
  const n = columns(ranks);
  const [codes, scales] = [new Uint8Array(n * k).fill(ZERO), new Float32Array((n * k) / BLOCK).fill(1)];
  const left = Float64Array.from(a);
  const [own, ownScales] = [new Uint8Array(ranks * k), new Float32Array((ranks * k) / BLOCK)];
  const starts = COUNTS.map((_, j) => COUNTS.slice(0, j).reduce((sum, count) => sum + filled(count * ranks), 0));
  for (let i = 0; i < DIGITS; i++) {
    digit(left, own, ownScales, 0);
    for (let j = 0; j < DIGITS - i; j++) {
      const row = starts[j] + i * ranks;
      codes.set(own, row * k);
      scales.set(ownScales, (row * k) / BLOCK);
    }
  }
  return weights(codes, scales, n, k);
}

/** Return [codes, scales] of B, numbers [n, ranks]. What is left is another for each digit of A. */
export function up(b, n, ranks) {
  const k = columns(ranks);
  const [codes, scales] = [new Uint8Array(n * k), new Float32Array((n * k) / BLOCK)];
  for (let row = 0, at = 0; row < n; row++) {
    const left = COUNTS.map(() => Float64Array.from(b.subarray(row * ranks, (row + 1) * ranks)));
    for (const count of COUNTS) {
      const wide = new Float64Array(filled(count * ranks));
      left.slice(0, count).forEach((values, i) => wide.set(values, i * ranks));
      digit(wide, codes, scales, at);
      left.slice(0, count).forEach((values, i) => values.set(wide.subarray(i * ranks, (i + 1) * ranks)));
      at += wide.length;
    }
  }
  return weights(codes, scales, n, k);
}
