import CoreGraphics
import Foundation

/// Alpha this close to 0 becomes 0, this close to 255 it becomes 255: nobody sees the difference.
private let clear: UInt8 = 4
private let solid: UInt8 = 8

/// Values (3 or 4, height, width) from -1 to 1 as bytes of red, green, blue and alpha.
///
/// A fourth channel is alpha, and the colors are times alpha. Without it, alpha is 255.
func pixels(_ values: [Float], height: Int, width: Int) throws -> [UInt8] {
    let places = height * width
    guard values.count == 3 * places || values.count == 4 * places else {
        throw SnapGenError(
            "a picture of \(width)x\(height) needs 3 or 4 values per pixel, got "
                + "\(values.count) numbers")
    }
    var bytes = [UInt8](repeating: 255, count: 4 * places)
    for place in 0..<places {
        for channel in 0..<(values.count / places) {
            let value = min(max(values[channel * places + place], -1), 1)
            bytes[4 * place + channel] = UInt8(((value + 1) * 127.5).rounded(.toNearestOrEven))
        }
        let alpha = bytes[4 * place + 3]
        if alpha <= clear {
            for channel in 0..<4 { bytes[4 * place + channel] = 0 }
        } else if alpha >= 255 - solid {
            bytes[4 * place + 3] = 255
        } else {
            // A color times alpha is at most alpha.
            for color in 0..<3 {
                bytes[4 * place + color] = min(bytes[4 * place + color], alpha)
            }
        }
    }
    return bytes
}

func makePicture(_ values: [Float], height: Int, width: Int) throws -> CGImage {
    let bytes = try pixels(values, height: height, width: width)
    let hasAlpha = values.count == 4 * height * width
    let alpha: CGImageAlphaInfo = hasAlpha ? .premultipliedLast : .noneSkipLast
    guard let provider = CGDataProvider(data: Data(bytes) as CFData),
        let space = CGColorSpace(name: CGColorSpace.sRGB),
        let picture = CGImage(
            width: width, height: height, bitsPerComponent: 8, bitsPerPixel: 32,
            bytesPerRow: 4 * width, space: space,
            bitmapInfo: CGBitmapInfo(rawValue: alpha.rawValue),
            provider: provider, decode: nil, shouldInterpolate: false, intent: .defaultIntent)
    else {
        throw SnapGenError("no memory for a picture of \(width)x\(height)")
    }
    return picture
}
