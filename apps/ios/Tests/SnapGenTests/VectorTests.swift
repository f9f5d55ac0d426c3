import XCTest

@testable import SnapGen

/// Numbers from mlx_snapgen (apps/ios/vectors.py); tests/applications/test_ios.py checks them.
private struct Vectors: Decodable {
    struct Tokens: Decodable {
        let prompt: String
        let tokens: [Int32]
        let mask: [Int32]
    }
    struct Schedule: Decodable {
        let steps: Int
        let shift: Double
        let sigmas: [Double]
    }
    struct Noise: Decodable {
        let seed: UInt64
        let draw: Int
        let channels: Int
        let height: Int
        let width: Int
        let latents: [Float]
    }
    struct Denoise: Decodable {
        let freshNoise: Bool
        let seed: UInt64
        let steps: Int
        let shift: Double
        let latents: [[Float]]
        let x0: [[Float]]
    }
    struct Guide: Decodable {
        let conditional: [Float]
        let unconditional: [Float]
        let scale: Float
        let guided: [Float]
    }
    struct Pixels: Decodable {
        let values: [Float]
        let bytes: [UInt8]
    }

    let maxLength: Int
    let tokens: [Tokens]
    let schedules: [Schedule]
    let noise: [Noise]
    let denoise: [Denoise]
    let guide: Guide
    let pixels: [Pixels]
}

final class VectorTests: XCTestCase {
    /// A file of the repository; the tests run where they were built.
    private func file(_ path: String) -> URL {
        var root = URL(fileURLWithPath: #filePath)
        for _ in 0..<5 {
            root.deleteLastPathComponent()
        }
        return root.appendingPathComponent(path)
    }

    private var tokenizerFile: URL {
        file("mlx_snapgen/models/fluent/tokenizer_0.model")
    }

    private func load() throws -> Vectors {
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        let data = try Data(contentsOf: file("apps/ios/Tests/vectors.json"))
        return try decoder.decode(Vectors.self, from: data)
    }

    private func assertClose(_ found: [Float], _ expected: [Float], line: UInt = #line) {
        XCTAssertEqual(found.count, expected.count, line: line)
        for (a, b) in zip(found, expected) {
            XCTAssertEqual(a, b, accuracy: 1e-5, line: line)
        }
    }

    func testTokenizer() throws {
        let vectors = try load()
        let tokenizer = try Tokenizer(contentsOf: tokenizerFile, maxLength: vectors.maxLength)
        for vector in vectors.tokens {
            let (tokens, mask) = tokenizer(vector.prompt)
            XCTAssertEqual(tokens, vector.tokens, vector.prompt)
            XCTAssertEqual(mask, vector.mask, vector.prompt)
        }
    }

    func testDamagedTokenizer() throws {
        let data = try Data(contentsOf: tokenizerFile)
        XCTAssertThrowsError(try Tokenizer(model: data.dropLast(), maxLength: 24))
    }

    func testSchedule() throws {
        for vector in try load().schedules {
            let sigmas = Sampler.schedule(steps: vector.steps, shift: vector.shift)
            XCTAssertEqual(sigmas.count, vector.sigmas.count)
            for (a, b) in zip(sigmas, vector.sigmas) {
                XCTAssertEqual(a, b, accuracy: 1e-12)
            }
        }
    }

    func testNoise() throws {
        for vector in try load().noise {
            let latents = noise(
                seed: vector.seed, draw: vector.draw, channels: vector.channels,
                height: vector.height, width: vector.width)
            assertClose(latents, vector.latents)
        }
    }

    /// With a velocity that has a closed form: v = x_t / 2 + sigma.
    func testDenoise() throws {
        for vector in try load().denoise {
            let draw = { noise(seed: vector.seed, draw: $0, channels: 3, height: 2, width: 2) }
            var denoising = Sampler.Denoising(
                noise: draw(0),
                schedule: Sampler.schedule(steps: vector.steps, shift: vector.shift),
                freshNoise: vector.freshNoise ? draw : nil)
            var steps: [Sampler.Step] = []
            while let step = denoising.step(velocity: { latents, sigma in
                latents.map { $0 / 2 + Float(sigma) }
            }) {
                steps.append(step)
            }
            XCTAssertEqual(steps.count, vector.steps)
            for (step, (latents, x0)) in zip(steps, zip(vector.latents, vector.x0)) {
                assertClose(step.latents, latents)
                assertClose(step.x0, x0)
            }
            assertClose(try XCTUnwrap(steps.last).latents, try XCTUnwrap(vector.latents.last))
        }
    }

    func testGuide() throws {
        let vector = try load().guide
        let guided = Sampler.guide(vector.conditional, vector.unconditional, scale: vector.scale)
        assertClose(guided, vector.guided)
    }

    func testTextsAreJoinedAlongTheirLength() {
        let first = TextStates(states: [1, 2, 3, 4], mask: [1, 0])
        let second = TextStates(states: [5, 6], mask: [1])
        let joined = TextStates(states: [1, 2, 5, 3, 4, 6], mask: [1, 0, 1])
        XCTAssertEqual(TextStates.joined([first, second]), joined)
    }

    func testAbsentTextKeepsItsStates() {
        let text = TextStates(states: [1, 2, 3, 4], mask: [1, 0])
        XCTAssertEqual(text.absent, TextStates(states: [1, 2, 3, 4], mask: [0, 0]))
    }

    func testPixels() throws {
        for vector in try load().pixels {
            XCTAssertEqual(try pixels(vector.values, height: 1, width: 4), vector.bytes)
        }
    }
}
