import CoreML
import Foundation

/// One compiled component in memory; releasing the object frees the memory.
final class Network {
    private let model: MLModel
    private let name: String

    private init(_ name: String, _ model: MLModel) {
        self.name = name
        self.model = model
    }

    /// - Parameter function: of a package with several, nil for its default one.
    static func load(at url: URL, computeUnits: MLComputeUnits, function: String? = nil)
        async throws -> sending Network
    {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = computeUnits
        if let function {
            guard #available(iOS 18, macOS 15, *) else {
                throw SnapGenError("choosing a function of a model takes iOS 18 or macOS 15")
            }
            configuration.functionName = function
        }
        let model = try await MLModel.load(contentsOf: url, configuration: configuration)
        return Network(url.deletingPathExtension().lastPathComponent, model)
    }

    /// Shape of an input, which is fixed in the model.
    func shape(of input: String) throws -> [Int] {
        try constraint(input).shape.map(\.intValue)
    }

    /// Names of the inputs.
    var inputs: [String] { Array(model.modelDescription.inputDescriptionsByName.keys) }

    /// Run with inputs by name, flat and in row-major order, and return the only output likewise.
    func callAsFunction(_ inputs: [String: [Float]]) throws -> [Float] {
        let outputs = try self.outputs(of: inputs)
        guard outputs.count == 1, let output = outputs.values.first else {
            throw SnapGenError("\(name) should have one output, has \(outputs.keys.sorted())")
        }
        return output
    }

    /// Run with inputs by name, flat and in row-major order, and return all outputs likewise.
    ///
    /// The arrays of a prediction are freed when it ends, not when the caller's thread gets to it.
    func outputs(of inputs: [String: [Float]]) throws -> [String: [Float]] {
        try autoreleasepool { try predict(inputs) }
    }

    private func predict(_ inputs: [String: [Float]]) throws -> [String: [Float]] {
        var features: [String: MLFeatureValue] = [:]
        for (input, values) in inputs {
            features[input] = MLFeatureValue(multiArray: try array(values, for: input))
        }
        let provider = try MLDictionaryFeatureProvider(dictionary: features)
        let outputs = try model.prediction(from: provider)
        var found: [String: [Float]] = [:]
        for output in outputs.featureNames {
            guard let result = outputs.featureValue(for: output)?.multiArrayValue else {
                throw SnapGenError("\(name) gives \(output), which is no multi-array")
            }
            // A copy, for any strides and type.
            let values = MLShapedArray<Float>(converting: result).scalars
            guard values.allSatisfy(\.isFinite) else {
                throw SnapGenError(
                    "\(name) gives numbers that are not finite: try other compute units")
            }
            found[output] = values
        }
        return found
    }

    private func constraint(_ input: String) throws -> MLMultiArrayConstraint {
        let description = model.modelDescription.inputDescriptionsByName[input]
        guard let constraint = description?.multiArrayConstraint else {
            let known = model.modelDescription.inputDescriptionsByName.keys.sorted()
            throw SnapGenError("\(name) has no multi-array '\(input)', only \(known)")
        }
        return constraint
    }

    private func array(_ values: [Float], for input: String) throws -> MLMultiArray {
        let shape = try self.shape(of: input)
        guard shape.reduce(1, *) == values.count else {
            throw SnapGenError("\(name) takes \(input) as \(shape), got \(values.count) numbers")
        }
        switch try constraint(input).dataType {
        case .float32:
            return MLMultiArray(MLShapedArray<Float>(scalars: values, shape: shape))
        case .int32:
            let numbers = values.map { Int32($0) }
            return MLMultiArray(MLShapedArray<Int32>(scalars: numbers, shape: shape))
        #if !(os(macOS) && arch(x86_64))
            case .float16:
                let halves = values.map { Float16($0) }
                return MLMultiArray(MLShapedArray<Float16>(scalars: halves, shape: shape))
        #endif
        default:
            throw SnapGenError("\(name) takes \(input) in a type that is not supported")
        }
    }
}
