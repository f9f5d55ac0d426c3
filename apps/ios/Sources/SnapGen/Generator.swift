import CoreGraphics
import CoreML
import Foundation

/// Text to picture with the components of a bundle, each in memory only while it is needed.
public struct Generator: Sendable {
    /// The caller's settings; nil uses the model's default.
    public struct Options: Sendable {
        public var seed: UInt64 = 0
        public var negativePrompt = ""
        public var steps: Int?
        public var guidanceScale: Float?
        /// Decode every step's estimate. Keeps the decoder in memory beside the transformer.
        public var previews = true
        /// Name of the transformer's function, for packages with several widths.
        public var function: String?

        public init() {}
    }

    public struct Step {
        public let index: Int
        public let count: Int
        /// The picture, or this step's estimate of it; nil without previews.
        public let picture: CGImage?

        public var isFinal: Bool { index == count - 1 }
    }

    public let bundle: ModelBundle
    public var computeUnits: MLComputeUnits

    public init(bundle: ModelBundle, computeUnits: MLComputeUnits = .cpuAndNeuralEngine) {
        self.bundle = bundle
        self.computeUnits = computeUnits
    }

    /// Draw a prompt, step by step. End the loop over the stream to cancel.
    public func generate(_ prompt: String, options: Options = Options())
        -> AsyncThrowingStream<Step, Error>
    {
        AsyncThrowingStream { continuation in
            let task = Task.detached(priority: .userInitiated) {
                do {
                    try await run(prompt, options) { continuation.yield($0) }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    private func run(_ prompt: String, _ options: Options, send: (Step) -> Void) async throws {
        var sampling = bundle.config.sampling
        sampling.numInferenceSteps = options.steps ?? sampling.numInferenceSteps
        sampling.guidanceScale = options.guidanceScale ?? sampling.guidanceScale
        guard !prompt.allSatisfy(\.isWhitespace) else {
            throw SnapGenError("the prompt is empty: say what to draw")
        }
        guard sampling.numInferenceSteps > 0 else {
            throw SnapGenError("the number of steps must be positive")
        }
        let guided = sampling.guidanceScale != 1
        let texts = try await encode(
            guided ? [prompt, options.negativePrompt] : [prompt], options)
        var decoder: Network?
        if options.previews {
            decoder = try await load("Decoder", options)
        }
        let (latents, shape) = try await denoise(texts, sampling, options, decoder, send)
        // The transformer is released at this point.
        if decoder == nil {
            decoder = try await load("Decoder", options)
        }
        let count = sampling.numInferenceSteps
        let picture = try decoder.map { try decode(latents, shape, with: $0) }
        send(Step(index: count - 1, count: count, picture: picture))
    }

    private func load(_ component: String, _ options: Options) async throws -> Network {
        let function = component.hasPrefix("Transformer") ? options.function : nil
        let url = bundle.component(component)
        return try await Network(at: url, computeUnits: computeUnits, function: function)
    }

    private func encode(_ prompts: [String], _ options: Options) async throws -> [TextStates] {
        var said = prompts.map { _ in [TextStates]() }
        for index in bundle.config.textEncoders.indices {
            let tokenizer = try bundle.tokenizer(index)
            let encoder = try await load("TextEncoder_\(index)", options)
            for (place, prompt) in prompts.enumerated() {
                let (tokens, mask) = tokenizer(prompt)
                let counts = mask.map { Float($0) }
                let states = try encoder(["tokens": tokens.map { Float($0) }, "mask": counts])
                said[place].append(TextStates(states: states, mask: counts))
            }
        }
        return said.map(TextStates.joined)
    }

    private func denoise(
        _ texts: [TextStates],
        _ sampling: ModelConfig.Sampling,
        _ options: Options,
        _ decoder: Network?,
        _ send: (Step) -> Void
    ) async throws -> ([Float], shape: [Int]) {
        var chunks: [Network] = []
        for component in bundle.transformer {
            chunks.append(try await load(component, options))
        }
        let shape = try chunks[0].shape(of: "x_t")
        guard shape.count == 4 else {
            throw SnapGenError("Transformer should take x_t (1, C, h, w), takes \(shape)")
        }
        let draw = {
            noise(
                seed: options.seed, draw: $0, channels: shape[1], height: shape[2], width: shape[3])
        }
        let latents = try Sampler.denoise(
            noise: draw(0),
            schedule: Sampler.schedule(
                steps: sampling.numInferenceSteps, shift: sampling.timeShift),
            velocity: { latents, sigma in
                let velocities = try texts.map { text in
                    try Task.checkCancellation()
                    return try Self.velocity(
                        of: [
                            "x_t": latents, "t": [Float(sigma)], "text": text.states,
                            "mask": text.mask,
                        ], chunks)
                }
                guard velocities.count == 2 else { return velocities[0] }
                return Sampler.guide(velocities[0], velocities[1], scale: sampling.guidanceScale)
            },
            freshNoise: sampling.freshNoise ? draw : nil,
            each: { step in
                guard step.index < sampling.numInferenceSteps - 1 else { return }
                let picture = try decoder.map { try decode(step.x0, shape, with: $0) }
                send(Step(index: step.index, count: sampling.numInferenceSteps, picture: picture))
            }
        )
        return (latents, shape)
    }

    /// Run the transformer: each chunk gets the inputs and the outputs of the chunks before it.
    private static func velocity(of inputs: [String: [Float]], _ chunks: [Network]) throws
        -> [Float]
    {
        guard chunks.count > 1 else { return try chunks[0](inputs) }
        var values = inputs
        for chunk in chunks {
            let names = Set(chunk.inputs)
            let outputs = try chunk.outputs(of: values.filter { names.contains($0.key) })
            values.merge(outputs) { _, new in new }
        }
        guard let velocity = values["velocity"] else {
            throw SnapGenError("the last chunk of the transformer gives no velocity")
        }
        return velocity
    }

    private func decode(_ latents: [Float], _ shape: [Int], with decoder: Network) throws
        -> CGImage
    {
        let values = try decoder(["latents": latents])
        // 8 pixels per latent, three colors.
        return try makePicture(values, height: 8 * shape[2], width: 8 * shape[3])
    }
}

/// Output of a text encoder: states (width, L) and mask (L), both flat.
struct TextStates: Equatable {
    let states: [Float]
    let mask: [Float]

    /// The texts of several encoders, concatenated along L.
    static func joined(_ texts: [TextStates]) -> TextStates {
        let width = texts[0].states.count / texts[0].mask.count
        let states = (0..<width).flatMap { row in
            texts.flatMap { $0.states[row * $0.mask.count..<(row + 1) * $0.mask.count] }
        }
        return TextStates(states: states, mask: texts.flatMap(\.mask))
    }
}
