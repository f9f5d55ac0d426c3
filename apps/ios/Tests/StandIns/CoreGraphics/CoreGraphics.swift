import Foundation

// The part of CoreGraphics that the package uses, for tests on other systems. Nothing here is
// Sendable that is not on Apple's systems.

public typealias CFData = Data
public typealias CFString = String

public final class CGColorSpace {
    public static let sRGB = "sRGB"

    public init?(name: CFString) {}
}

public final class CGDataProvider {
    let data: Data

    public init?(data: CFData) {
        self.data = data
    }
}

public enum CGImageAlphaInfo: UInt32, Sendable {
    case premultipliedLast = 1
    case noneSkipLast = 5
}

public struct CGBitmapInfo: OptionSet, Sendable {
    public let rawValue: UInt32

    public init(rawValue: UInt32) {
        self.rawValue = rawValue
    }
}

public enum CGColorRenderingIntent: Sendable {
    case defaultIntent
}

public final class CGImage {
    public let width: Int
    public let height: Int
    /// Not in CoreGraphics.
    public let bytes: [UInt8]

    public init?(
        width: Int, height: Int, bitsPerComponent: Int, bitsPerPixel: Int, bytesPerRow: Int,
        space: CGColorSpace, bitmapInfo: CGBitmapInfo, provider: CGDataProvider, decode: [Double]?,
        shouldInterpolate: Bool, intent: CGColorRenderingIntent
    ) {
        guard provider.data.count == bytesPerRow * height else { return nil }
        self.width = width
        self.height = height
        bytes = [UInt8](provider.data)
    }
}
