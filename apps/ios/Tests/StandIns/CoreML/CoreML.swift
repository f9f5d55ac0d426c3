import Foundation

// The part of CoreML that the package uses, for tests on other systems. Nothing here is Sendable
// that is not on Apple's systems. `StandIn` says what the models compute.

public enum MLComputeUnits: Sendable {
    case all, cpuOnly, cpuAndGPU, cpuAndNeuralEngine
}

public final class MLModelConfiguration {
    public var computeUnits = MLComputeUnits.all
    public var functionName: String?

    public init() {}
}

public enum MLMultiArrayDataType: Sendable {
    case float32, float16, int32, double
}

public final class MLMultiArray {
    let values: [Float]
    let shape: [Int]
    let type: MLMultiArrayDataType

    public init<Scalar: MLShapedArrayScalar>(_ array: MLShapedArray<Scalar>) {
        values = array.scalars.map(\.asFloat)
        shape = array.shape
        type = Scalar.type
    }
}

public protocol MLShapedArrayScalar {
    static var type: MLMultiArrayDataType { get }
    var asFloat: Float { get }
    init(asFloat: Float)
}

extension Float: MLShapedArrayScalar {
    public static let type = MLMultiArrayDataType.float32
    public var asFloat: Float { self }
    public init(asFloat: Float) { self = asFloat }
}

extension Int32: MLShapedArrayScalar {
    public static let type = MLMultiArrayDataType.int32
    public var asFloat: Float { Float(self) }
    public init(asFloat: Float) { self = Int32(asFloat) }
}

extension Float16: MLShapedArrayScalar {
    public static let type = MLMultiArrayDataType.float16
    public var asFloat: Float { Float(self) }
    public init(asFloat: Float) { self = Float16(asFloat) }
}

public struct MLShapedArray<Scalar: MLShapedArrayScalar> {
    public let scalars: [Scalar]
    public let shape: [Int]

    public init(scalars: [Scalar], shape: [Int]) {
        precondition(shape.reduce(1, *) == scalars.count)
        self.scalars = scalars
        self.shape = shape
    }

    public init(converting array: MLMultiArray) {
        scalars = array.values.map { Scalar(asFloat: $0) }
        shape = array.shape
    }
}

public final class MLFeatureValue {
    public let multiArrayValue: MLMultiArray?

    public init(multiArray: MLMultiArray) {
        multiArrayValue = multiArray
    }
}

public protocol MLFeatureProvider: AnyObject {
    var featureNames: Set<String> { get }
    func featureValue(for name: String) -> MLFeatureValue?
}

public final class MLDictionaryFeatureProvider: MLFeatureProvider {
    private let values: [String: MLFeatureValue]

    public init(dictionary: [String: Any]) throws {
        values = dictionary.compactMapValues { $0 as? MLFeatureValue }
    }

    public var featureNames: Set<String> { Set(values.keys) }
    public func featureValue(for name: String) -> MLFeatureValue? { values[name] }
}

public final class MLMultiArrayConstraint {
    public let shape: [NSNumber]
    public let dataType: MLMultiArrayDataType

    init(_ shape: [Int], _ dataType: MLMultiArrayDataType) {
        self.shape = shape.map { NSNumber(value: $0) }
        self.dataType = dataType
    }
}

public final class MLFeatureDescription {
    public let multiArrayConstraint: MLMultiArrayConstraint?

    init(_ constraint: MLMultiArrayConstraint) {
        multiArrayConstraint = constraint
    }
}

public final class MLModelDescription {
    public let inputDescriptionsByName: [String: MLFeatureDescription]

    init(_ inputs: [String: StandIn.Input]) {
        inputDescriptionsByName = inputs.mapValues {
            MLFeatureDescription(MLMultiArrayConstraint($0.shape, $0.type))
        }
    }
}

public final class MLModel {
    public let modelDescription: MLModelDescription
    private let name: String
    private let model: StandIn.Model

    private init(_ name: String, _ model: StandIn.Model) {
        self.name = name
        self.model = model
        modelDescription = MLModelDescription(model.inputs)
        StandIn.log("load \(name)")
    }

    deinit {
        StandIn.log("free \(name)")
    }

    public class func load(contentsOf url: URL, configuration: MLModelConfiguration) async throws
        -> MLModel
    {
        let name = url.deletingPathExtension().lastPathComponent
        guard let model = StandIn.model(name) else { throw CocoaError(.fileNoSuchFile) }
        return MLModel(name, model)
    }

    public func prediction(from input: MLFeatureProvider) throws -> MLFeatureProvider {
        precondition(Thread.current.threadDictionary[poolKey] != nil, "not in an autoreleasepool")
        var values: [String: [Float]] = [:]
        for name in input.featureNames {
            let array = input.featureValue(for: name)!.multiArrayValue!
            let expected = model.inputs[name]!
            precondition(array.shape == expected.shape && array.type == expected.type)
            values[name] = array.values
        }
        precondition(Set(values.keys) == Set(model.inputs.keys))
        StandIn.log("run \(name)")
        let outputs = try model.run(values)
        StandIn.log("ran \(name)")
        return try MLDictionaryFeatureProvider(
            dictionary: outputs.mapValues {
                MLFeatureValue(
                    multiArray: MLMultiArray(MLShapedArray<Float>(scalars: $0, shape: [$0.count])))
            })
    }
}

private let poolKey = "autoreleasepool"

/// Foundation has it on Apple's systems.
public func autoreleasepool<Result>(invoking body: () throws -> Result) rethrows -> Result {
    let outer = Thread.current.threadDictionary[poolKey]
    Thread.current.threadDictionary[poolKey] = true
    defer { Thread.current.threadDictionary[poolKey] = outer }
    return try body()
}

/// What the models compute, and what was done with them. Not in CoreML.
public enum StandIn {
    public struct Input: Sendable {
        let shape: [Int]
        let type: MLMultiArrayDataType

        public init(_ shape: [Int], _ type: MLMultiArrayDataType = .float32) {
            self.shape = shape
            self.type = type
        }
    }

    public struct Model: Sendable {
        let inputs: [String: Input]
        let run: @Sendable ([String: [Float]]) throws -> [String: [Float]]

        public init(
            _ inputs: [String: Input],
            run: @escaping @Sendable ([String: [Float]]) throws -> [String: [Float]]
        ) {
            self.inputs = inputs
            self.run = run
        }
    }

    private static let lock = NSLock()
    nonisolated(unsafe) private static var models: [String: Model] = [:]
    nonisolated(unsafe) private static var events: [String] = []

    /// Use these models and forget what was done before.
    public static func use(_ models: [String: Model]) {
        lock.withLock {
            self.models = models
            events = []
        }
    }

    /// "load NAME", "run NAME" and "ran NAME" around each prediction, "free NAME", in order.
    public static var log: [String] { lock.withLock { events } }

    static func log(_ event: String) { lock.withLock { events.append(event) } }
    static func model(_ name: String) -> Model? { lock.withLock { models[name] } }
}
