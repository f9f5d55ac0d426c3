import Foundation

/// A folder with the compiled components, the tokenizer and the model's own config.json.
///
///     config.json  tokenizer_0.model
///     TextEncoder.mlmodelc  Transformer.mlmodelc  Decoder.mlmodelc
public struct ModelBundle {
    public enum Component: String, CaseIterable {
        case textEncoder = "TextEncoder"
        case transformer = "Transformer"
        case decoder = "Decoder"
    }

    public let folder: URL
    public let config: ModelConfig

    public init(folder: URL) throws {
        self.folder = folder
        let files = Component.allCases.map { "\($0.rawValue).mlmodelc" }
        for file in files + ["config.json", "tokenizer_0.model"] {
            guard FileManager.default.fileExists(atPath: folder.appendingPathComponent(file).path)
            else {
                throw SnapGenError("\(folder.lastPathComponent) lacks \(file): see the README")
            }
        }
        let data = try Data(contentsOf: folder.appendingPathComponent("config.json"))
        do {
            config = try ModelConfig(json: data)
        } catch let error as DecodingError {
            throw SnapGenError("config.json is not a model's: \(error)")
        }
    }

    public func url(_ component: Component) -> URL {
        folder.appendingPathComponent("\(component.rawValue).mlmodelc")
    }

    public func tokenizer() throws -> Tokenizer {
        let url = folder.appendingPathComponent("tokenizer_0.model")
        return try Tokenizer(contentsOf: url, maxLength: config.textEncoders[0].maxLength)
    }
}

/// What the runner needs of config.json; other keys are for others.
public struct ModelConfig: Decodable {
    public struct Sampling: Decodable, Equatable {
        public var numInferenceSteps: Int
        public var guidanceScale: Float
        public var timeShift: Double
        public var freshNoise: Bool
    }

    public struct TextEncoder: Decodable {
        public let kind: String
        public let maxLength: Int
    }

    public let name: String
    public let textEncoders: [TextEncoder]
    public let sampler: Sampling
    public let fewStep: Sampling?

    public init(json: Data) throws {
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        self = try decoder.decode(ModelConfig.self, from: json)
        guard textEncoders.count == 1, textEncoders[0].kind == "transformer" else {
            throw SnapGenError("only a model with one text encoder of its own kind can run here")
        }
    }

    /// How to sample when the caller does not say: in few steps, if the model knows how.
    public var sampling: Sampling { fewStep ?? sampler }
}
