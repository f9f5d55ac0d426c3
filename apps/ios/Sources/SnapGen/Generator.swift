import CoreGraphics
import CoreML

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

    /// Unchecked, because a `CGImage` never changes but is not declared `Sendable` everywhere.
    public struct Step: @unchecked Sendable {
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

    /// Draw a prompt, step by step: each step is computed when the loop asks for it, away from the
    /// caller's actor.
    ///
    /// Leave the loop or cancel its task to stop. A canceled loop ends with `CancellationError`
    /// when the prediction that runs has ended, so that nothing runs on behind it.
    public func generate(_ prompt: String, options: Options = Options()) -> Steps {
        Steps(generator: self, prompt: prompt, options: options)
    }

    public struct Steps: AsyncSequence, Sendable {
        public typealias Element = Step

        let generator: Generator
        let prompt: String
        let options: Options

        public func makeAsyncIterator() -> Iterator {
            Iterator(drawing: Drawing(generator, prompt, options))
        }

        public struct Iterator: AsyncIteratorProtocol, Sendable {
            let drawing: Drawing

            public func next() async throws -> Step? {
                try await drawing.next()
            }
        }
    }
}
