import Foundation

/// A mistake of the caller or a bundle that does not fit: one line, with what to do.
public struct SnapGenError: LocalizedError, Equatable {
    public let message: String

    public init(_ message: String) {
        self.message = message
    }

    public var errorDescription: String? { message }
}
