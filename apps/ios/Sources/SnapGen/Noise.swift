import Foundation

/// The normal numbers of `mlx.core.random`, so that a seed gives the same noise as in mlx_snapgen.
///
/// Keys are hashed with Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as
/// 1, 2, 3"), and uniform numbers become normal ones through the inverse error function in single
/// precision (Giles 2010, "Approximating the erfinv function").
public struct NoiseKey: Equatable, Sendable {
    var high: UInt32
    var low: UInt32

    public init(seed: UInt64) {
        high = UInt32(truncatingIfNeeded: seed >> 32)
        low = UInt32(truncatingIfNeeded: seed)
    }

    /// The second of the two keys that this one splits into.
    func next() -> NoiseKey {
        var key = self
        let bits = self.bits(count: 4)
        key.high = bits[2]
        key.low = bits[3]
        return key
    }

    private static let rotations: [[UInt32]] = [[13, 15, 26, 6], [17, 29, 16, 24]]

    func hash(_ first: UInt32, _ second: UInt32) -> (UInt32, UInt32) {
        let keys = [high, low, high ^ low ^ 0x1BD1_1BDA]
        var x = first &+ keys[0]
        var y = second &+ keys[1]
        for round in 0..<5 {
            for rotation in NoiseKey.rotations[round % 2] {
                x = x &+ y
                y = (y << rotation) | (y >> (32 - rotation))
                y = y ^ x
            }
            x = x &+ keys[(round + 1) % 3]
            y = y &+ keys[(round + 2) % 3] &+ UInt32(round + 1)
        }
        return (x, y)
    }

    func bits(count: Int) -> [UInt32] {
        var bits = [UInt32](repeating: 0, count: count)
        let half = count / 2
        let odd = count % 2
        for i in 0..<half {
            (bits[i], bits[i + half + odd]) = hash(UInt32(i), UInt32(i + half + odd))
        }
        if odd == 1 {
            bits[half] = hash(UInt32(half), 0).0
        }
        return bits
    }

    /// `count` numbers of mean 0 and variance 1.
    public func normal(count: Int) -> [Float] {
        let low = Float(-1).nextUp
        return bits(count: count).map { bits in
            let uniform = min(Float(bits) / Float(UInt32.max), Float(1).nextDown)
            return Float(2).squareRoot() * inverseErf(uniform * (1 - low) + low)
        }
    }
}

private let nearCentre: [Float] = [
    2.810_226_36e-08, 3.432_739_39e-07, -3.523_387_7e-06, -4.391_506_54e-06, 0.000_218_580_87,
    -0.001_253_725_03, -0.004_177_681_64, 0.246_640_727, 1.501_409_41,
]
private let inTail: [Float] = [
    -0.000_200_214_257, 0.000_100_950_558, 0.001_349_343_22, -0.003_673_428_44, 0.005_739_507_73,
    -0.007_622_461_3, 0.009_438_870_47, 1.001_674_06, 2.832_976_82,
]

private func inverseErf(_ x: Float) -> Float {
    let w = -log((1 - x) * (1 + x))
    let at = w < 5 ? w - 2.5 : w.squareRoot() - 3
    return (w < 5 ? nearCentre : inTail).reduce(0) { $0 * at + $1 } * x
}

/// Unit Gaussian latents of one picture's seed, in the order (channel, row, column).
///
/// Draw 0 is the initial noise; later draws are fresh noise for the steps.
public func noise(seed: UInt64, draw: Int, channels: Int, height: Int, width: Int) -> [Float] {
    var key = NoiseKey(seed: seed)
    for _ in 0..<draw {
        key = key.next()
    }
    // The order in mlx_snapgen is (row, column, channel).
    let places = height * width
    let drawn = key.normal(count: places * channels)
    var latents = [Float](repeating: 0, count: drawn.count)
    for place in 0..<places {
        for channel in 0..<channels {
            latents[channel * places + place] = drawn[place * channels + channel]
        }
    }
    return latents
}
