/// Flow-matching sampling as pure functions, those of mlx_snapgen/sampling.py.
///
/// Noise level sigma runs from 1 (noise) to 0 (picture): x_t = (1 - sigma) x0 + sigma eps, and the
/// network's velocity is v = eps - x0. Latents are flat, in the order (channel, row, column).
public enum Sampler {
    /// Timestep shift of SD3: shift t / (1 + (shift - 1) t).
    public static func shiftTime(_ t: Double, shift: Double) -> Double {
        shift * t / (1 + (shift - 1) * t)
    }

    /// `steps + 1` noise levels from 1 down to 0: 1, .9, .75, .5, 0 for 4 at shift 3.
    public static func schedule(steps: Int, shift: Double) -> [Double] {
        (0...steps).map { shiftTime(1 - Double($0) / Double(steps), shift: shift) }
    }

    /// The sampler's state after a step: latents at the next noise level, and the estimate of the
    /// clean latents at the start of the step.
    public struct Step: Sendable {
        public let index: Int
        public let latents: [Float]
        public let x0: [Float]
    }

    /// The way from noise to clean latents, one step at each call of `step`.
    public struct Denoising {
        public let schedule: [Double]
        private let freshNoise: ((Int) -> [Float])?
        private var latents: [Float]
        private var index = 0

        /// - Parameter freshNoise: nil takes Euler steps along the flow. Otherwise each step adds
        ///   new noise to its estimate instead: the function is called with 1, 2, ... and returns
        ///   unit noise. Models distilled by distribution matching are trained so (DMD2, 4.4).
        public init(
            noise: [Float], schedule: [Double], freshNoise: ((Int) -> [Float])? = nil
        ) {
            self.schedule = schedule
            self.freshNoise = freshNoise
            latents = noise
        }

        /// Number of steps.
        public var count: Int { schedule.count - 1 }

        /// Take a step; nil after the last one.
        ///
        /// - Parameter velocity: the network's at latents and noise level, guidance included.
        public mutating func step(velocity: ([Float], Double) throws -> [Float]) rethrows
            -> Step?
        {
            guard index < count else { return nil }
            let (sigma, next) = (schedule[index], schedule[index + 1])
            let v = try velocity(latents, sigma)
            let x0 = zip(latents, v).map { $0 - Float(sigma) * $1 }
            if next == 0 {
                latents = x0
            } else if let freshNoise {
                let eps = freshNoise(index + 1)
                latents = zip(x0, eps).map { (1 - Float(next)) * $0 + Float(next) * $1 }
            } else {
                latents = zip(latents, v).map { $0 + Float(next - sigma) * $1 }
            }
            index += 1
            return Step(index: index - 1, latents: latents, x0: x0)
        }
    }

    /// Classifier-free guidance: v_uncond + scale (v_cond - v_uncond); scale 1 disables guidance.
    public static func guide(_ conditional: [Float], _ unconditional: [Float], scale: Float)
        -> [Float]
    {
        zip(conditional, unconditional).map { $1 + scale * ($0 - $1) }
    }
}
