// The noise of a seed, as torch draws it on a CPU and as `alphaflow sample` uses it: torch.Generator().manual_seed(seed),
// then torch.randn. The generator is MT19937; normals come by Box and Muller's formula, eight pairs at a time.
// Float32 noise equals torch's up to the last bit of its logarithm and cosine; float64 noise up to none.

const SIZE = 624, FIRST = 397;
const f = Math.fround;

export class TorchRandom {
  constructor(seed) {
    const state = new Uint32Array(SIZE);
    state[0] = Number(BigInt(seed) & 0xffffffffn); // torch seeds MT19937 with the lower 32 bits
    for (let i = 1; i < SIZE; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
    this.state = state;
    this.place = SIZE;
  }

  next() {
    const state = this.state;
    if (this.place === SIZE) {
      for (let i = 0; i < SIZE; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % SIZE] & 0x7fffffff);
        state[i] = state[(i + FIRST) % SIZE] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.place = 0;
    }
    let y = state[this.place++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  // torch.randn(count): at least 16 numbers; fewer, torch draws in another way.
  normals(count) {
    const draw = () => (this.next() & 0xffffff) / 2 ** 24;
    const pair = (u, v) => {
      const radius = f(Math.sqrt(f(-2 * f(Math.log(f(1 - u)))))), angle = f(f(2 * Math.PI) * v);
      return [f(radius * f(Math.cos(angle))), f(radius * f(Math.sin(angle)))];
    };
    return fill(new Float32Array(count), draw, pair);
  }

  // torch.randn(count, dtype=torch.float64), rounded to float32.
  wideNormals(count) {
    const draw = () => ((this.next() & 0x1fffff) * 2 ** 32 + this.next()) / 2 ** 53;
    const pair = (u, v) => {
      const radius = Math.sqrt(-2 * Math.log(1 - u)), angle = 2 * Math.PI * v;
      return [radius * Math.cos(angle), radius * Math.sin(angle)];
    };
    return Float32Array.from(fill(new Float64Array(count), draw, pair));
  }
}

function fill(numbers, draw, pair) {
  const group = (first) => {
    for (let i = first; i < first + 8; i++) [numbers[i], numbers[i + 8]] = pair(numbers[i], numbers[i + 8]);
  };
  const count = numbers.length;
  for (let i = 0; i < count; i++) numbers[i] = draw();
  for (let i = 0; i + 16 <= count; i += 16) group(i);
  if (count % 16) { // torch draws the last 16 anew
    for (let i = count - 16; i < count; i++) numbers[i] = draw();
    group(count - 16);
  }
  return numbers;
}
