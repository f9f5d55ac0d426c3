import CoreGraphics

/// One run of a generator, which computes a step at each call of `next`.
actor Drawing {
    private let generator: Generator
    private let prompt: String
    private let options: Generator.Options
    private var texts: [TextStates] = []
    private var transformer: [Network] = []
    private var decoder: Network?
    private var denoising: Sampler.Denoising?
    private var shape: [Int] = []
    private var scale: Float = 1
    private var hasEnded = false

    init(_ generator: Generator, _ prompt: String, _ options: Generator.Options) {
        self.generator = generator
        self.prompt = prompt
        self.options = options
    }

    /// The next step; nil after the last one or an error.
    func next() async throws -> Generator.Step? {
        guard !hasEnded else { return nil }
        do {
            if denoising == nil {
                try await begin()
            }
            return try await step()
        } catch {
            end()
            throw error
        }
    }

    private func end() {
        hasEnded = true
        transformer = []
        decoder = nil
        denoising = nil
    }

    private func begin() async throws {
        var sampling = generator.bundle.config.sampling
        sampling.numInferenceSteps = options.steps ?? sampling.numInferenceSteps
        sampling.guidanceScale = options.guidanceScale ?? sampling.guidanceScale
        guard !prompt.allSatisfy(\.isWhitespace) else {
            throw SnapGenError("the prompt is empty: say what to draw")
        }
        guard sampling.numInferenceSteps > 0 else {
            throw SnapGenError("the number of steps must be positive")
        }
        scale = sampling.guidanceScale
        let isEmpty = options.negativePrompt.allSatisfy(\.isWhitespace)
        let negative: String? =
            isEmpty && generator.bundle.config.isUnconditionalAbsent ? nil : options.negativePrompt
        texts = try await encode(scale != 1 ? [prompt, negative] : [prompt])
        if options.previews {
            decoder = try await load("Decoder")
        }
        for component in generator.bundle.transformer {
            transformer.append(try await load(component))
        }
        let shape = try transformer[0].shape(of: "x_t")
        guard shape.count == 4 else {
            throw SnapGenError("Transformer should take x_t (1, C, h, w), takes \(shape)")
        }
        self.shape = shape
        let seed = options.seed
        let draw = {
            noise(seed: seed, draw: $0, channels: shape[1], height: shape[2], width: shape[3])
        }
        denoising = Sampler.Denoising(
            noise: draw(0),
            schedule: Sampler.schedule(
                steps: sampling.numInferenceSteps, shift: sampling.timeShift),
            freshNoise: sampling.freshNoise ? draw : nil)
    }

    private func step() async throws -> Generator.Step? {
        guard var denoising else { return nil }
        let found = try denoising.step(velocity: velocity)
        self.denoising = denoising
        guard let step = found else { return nil }
        let count = denoising.count
        if step.index < count - 1 {
            let picture = try decoder.map { try decode(step.x0, with: $0) }
            return Generator.Step(index: step.index, count: count, picture: picture)
        }
        transformer = []
        let decoder: Network
        if let loaded = self.decoder {
            decoder = loaded
        } else {
            decoder = try await load("Decoder")
        }
        let picture = try decode(step.latents, with: decoder)
        end()
        return Generator.Step(index: step.index, count: count, picture: picture)
    }

    private func load(_ component: String) async throws -> Network {
        try Task.checkCancellation()
        let function = component.hasPrefix("Transformer") ? options.function : nil
        let url = generator.bundle.component(component)
        return try await Network.load(
            at: url, computeUnits: generator.computeUnits, function: function)
    }

    /// The states of the prompts; nil is absent text, none of whose tokens counts.
    private func encode(_ prompts: [String?]) async throws -> [TextStates] {
        var said = prompts.map { _ in [TextStates]() }
        for index in generator.bundle.config.textEncoders.indices {
            let tokenizer = try generator.bundle.tokenizer(index)
            let encoder = try await load("TextEncoder_\(index)")
            for (place, prompt) in prompts.enumerated() {
                let (tokens, mask) = tokenizer(prompt ?? "")
                let counts = mask.map { Float($0) }
                try Task.checkCancellation()
                let states = try encoder(["tokens": tokens.map { Float($0) }, "mask": counts])
                let text = TextStates(states: states, mask: counts)
                said[place].append(prompt == nil ? text.absent : text)
            }
        }
        return said.map(TextStates.joined)
    }

    /// The velocity at latents and noise level, guidance included.
    private func velocity(_ latents: [Float], _ sigma: Double) throws -> [Float] {
        let velocities = try texts.map { text in
            try Task.checkCancellation()
            return try predict([
                "x_t": latents, "t": [Float(sigma)], "text": text.states, "mask": text.mask,
            ])
        }
        guard velocities.count == 2 else { return velocities[0] }
        return Sampler.guide(velocities[0], velocities[1], scale: scale)
    }

    /// Run the transformer: each chunk gets the inputs and the outputs of the chunks before it.
    private func predict(_ inputs: [String: [Float]]) throws -> [Float] {
        guard transformer.count > 1 else { return try transformer[0](inputs) }
        var values = inputs
        for chunk in transformer {
            try Task.checkCancellation()
            let names = Set(chunk.inputs)
            let outputs = try chunk.outputs(of: values.filter { names.contains($0.key) })
            values.merge(outputs) { _, new in new }
        }
        guard let velocity = values["velocity"] else {
            throw SnapGenError("the last chunk of the transformer gives no velocity")
        }
        return velocity
    }

    private func decode(_ latents: [Float], with decoder: Network) throws -> CGImage {
        try Task.checkCancellation()
        let values = try decoder(["latents": latents])
        // A latent covers a square of pixels whose side is a power of two, so only the values of
        // three channels divide by three.
        let perLatent = values.count / (shape[2] * shape[3])
        let channels = perLatent.isMultiple(of: 3) ? 3 : 4
        let side = Int(Double(perLatent / channels).squareRoot())
        return try makePicture(values, height: side * shape[2], width: side * shape[3])
    }
}

/// Output of a text encoder: states (width, L) and mask (L), both flat.
struct TextStates: Equatable {
    let states: [Float]
    let mask: [Float]

    /// These states with a mask by which none of them counts.
    var absent: TextStates {
        TextStates(states: states, mask: mask.map { _ in 0 })
    }

    /// The texts of several encoders, concatenated along L.
    static func joined(_ texts: [TextStates]) -> TextStates {
        let width = texts[0].states.count / texts[0].mask.count
        let states = (0..<width).flatMap { row in
            texts.flatMap { $0.states[row * $0.mask.count..<(row + 1) * $0.mask.count] }
        }
        return TextStates(states: states, mask: texts.flatMap(\.mask))
    }
}
