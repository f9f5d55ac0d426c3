#if canImport(ImageIO)
import CoreGraphics
import ImageIO
import SnapGen
import XCTest

/// Draws with the compiled packages in the folder SNAPGEN_MODEL and writes picture.png there.
final class DrawTests: XCTestCase {
    func testDraw() async throws {
        guard let path = ProcessInfo.processInfo.environment["SNAPGEN_MODEL"] else {
            throw XCTSkip("SNAPGEN_MODEL is not set")
        }
        let folder = URL(fileURLWithPath: path)
        let generator = Generator(bundle: try ModelBundle(folder: folder), computeUnits: .cpuOnly)
        var options = Generator.Options()
        options.seed = 7
        var last: CGImage?
        for try await step in generator.generate(
            "a red apple to the left of a blue car", options: options)
        {
            last = step.picture
        }
        let picture = try XCTUnwrap(last)
        let file = folder.appendingPathComponent("picture.png") as CFURL
        let output = try XCTUnwrap(
            CGImageDestinationCreateWithURL(file, "public.png" as CFString, 1, nil))
        CGImageDestinationAddImage(output, picture, nil)
        XCTAssertTrue(CGImageDestinationFinalize(output))
    }
}
#endif
