import CoreGraphics
import Foundation

/// Colors (3, height, width) from -1 to 1 as bytes of red, green, blue and an unused one.
func pixels(_ values: [Float], height: Int, width: Int) throws -> [UInt8] {
    let places = height * width
    guard values.count == 3 * places else {
        throw SnapGenError(
            "a picture of \(width)x\(height) needs 3 colors, got \(values.count) numbers")
    }
    var bytes = [UInt8](repeating: 255, count: 4 * places)
    for place in 0..<places {
        for color in 0..<3 {
            let value = min(max(values[color * places + place], -1), 1)
            bytes[4 * place + color] = UInt8(((value + 1) * 127.5).rounded(.toNearestOrEven))
        }
    }
    return bytes
}

func makePicture(_ values: [Float], height: Int, width: Int) throws -> CGImage {
    let bytes = try pixels(values, height: height, width: width)
    guard let provider = CGDataProvider(data: Data(bytes) as CFData),
        let space = CGColorSpace(name: CGColorSpace.sRGB),
        let picture = CGImage(
            width: width, height: height, bitsPerComponent: 8, bitsPerPixel: 32,
            bytesPerRow: 4 * width, space: space,
            bitmapInfo: CGBitmapInfo(rawValue: CGImageAlphaInfo.noneSkipLast.rawValue),
            provider: provider, decode: nil, shouldInterpolate: false, intent: .defaultIntent)
    else {
        throw SnapGenError("no memory for a picture of \(width)x\(height)")
    }
    return picture
}
