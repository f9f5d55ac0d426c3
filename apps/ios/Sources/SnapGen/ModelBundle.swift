import Foundation

/// A folder that python -m convert.coreml wrote, its packages compiled:
///
///     config.json  tokenizer_0.model
///     TextEncoder_0.mlmodelc  Transformer.mlmodelc  Decoder.mlmodelc
///
/// A model with several text encoders has TextEncoder_1.mlmodelc, tokenizer_1.model and so on. A
/// transformer in chunks is Transformer_0.mlmodelc, Transformer_1.mlmodelc and so on.
public struct ModelBundle: Sendable {
    public let folder: URL
    public let config: ModelConfig
    /// Components that the transformer consists of, in order.
    public let transformer: [String]

    public init(folder: URL) throws {
        self.folder = folder
        func check(_ file: String) throws {
            let path = folder.appendingPathComponent(file).path
            guard FileManager.default.fileExists(atPath: path) else {
                throw SnapGenError("\(folder.lastPathComponent) lacks \(file): see the README")
            }
        }
        try check("config.json")
        let data = try Data(contentsOf: folder.appendingPathComponent("config.json"))
        do {
            config = try ModelConfig(json: data)
        } catch let error as DecodingError {
            throw SnapGenError("config.json is not a model's: \(error)")
        }
        var chunks = 0
        while FileManager.default.fileExists(
            atPath: folder.appendingPathComponent("Transformer_\(chunks).mlmodelc").path)
        {
            chunks += 1
        }
        transformer = chunks == 0 ? ["Transformer"] : (0..<chunks).map { "Transformer_\($0)" }
        let encoders = config.textEncoders.indices
        for name in transformer + ["Decoder"] + encoders.map({ "TextEncoder_\($0)" }) {
            try check("\(name).mlmodelc")
        }
        for index in encoders {
            try check("tokenizer_\(index).model")
        }
    }

    /// Path of the compiled component of this name.
    public func component(_ name: String) -> URL {
        folder.appendingPathComponent("\(name).mlmodelc")
    }

    /// The tokenizer of text encoder `index`.
    public func tokenizer(_ index: Int) throws -> Tokenizer {
        let url = folder.appendingPathComponent("tokenizer_\(index).model")
        return try Tokenizer(contentsOf: url, maxLength: config.textEncoders[index].maxLength)
    }
}

/// The keys of config.json that this package needs; others are ignored.
public struct ModelConfig: Decodable, Sendable {
    public struct Sampling: Decodable, Equatable, Sendable {
        public var numInferenceSteps: Int
        public var guidanceScale: Float
        public var timeShift: Double
        public var freshNoise: Bool
    }

    public struct TextEncoder: Decodable, Sendable {
        public let kind: String
        public let maxLength: Int
    }

    public let name: String
    public let textEncoders: [TextEncoder]
    public let sampler: Sampling
    public let fewStep: Sampling?
    /// "absent", or "empty prompt"; nil in older exports, which have the latter.
    let unconditional: String?

    public init(json: Data) throws {
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        self = try decoder.decode(ModelConfig.self, from: json)
        guard !textEncoders.isEmpty, textEncoders.allSatisfy({ $0.kind == "transformer" }) else {
            throw SnapGenError("only models whose text encoders are of their own kind run here")
        }
    }

    /// The default sampler: that of the few-step mode, if the model has one.
    public var sampling: Sampling { fewStep ?? sampler }

    /// Whether guidance without a negative prompt compares with absent text, not an empty prompt.
    public var isUnconditionalAbsent: Bool { unconditional == "absent" }
}
