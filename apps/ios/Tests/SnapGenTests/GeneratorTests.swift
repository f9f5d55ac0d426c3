// With the stand-ins of Tests/StandIns, which record what was loaded and run.
#if !canImport(Darwin)
    import CoreGraphics
    import CoreML
    import XCTest

    @testable import SnapGen

    final class GeneratorTests: XCTestCase {
        private let length = 32
        private var folder = URL(fileURLWithPath: "/")

        override func setUpWithError() throws {
            let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
                .appendingPathComponent("../../../../mlx_snapgen/models/fluent")
            folder = FileManager.default.temporaryDirectory.appendingPathComponent(
                UUID().uuidString)
            try FileManager.default.createDirectory(
                at: folder, withIntermediateDirectories: true)
            for file in ["config.json", "tokenizer_0.model"] {
                try FileManager.default.copyItem(
                    at: root.appendingPathComponent(file),
                    to: folder.appendingPathComponent(file))
            }
        }

        override func tearDownWithError() throws {
            try FileManager.default.removeItem(at: folder)
        }

        /// Latents (1, 2, 1, 2); the velocity is x_t / 2 + sigma plus the mean of the text.
        private func bundle(
            transformer: [String: StandIn.Model]? = nil, pause: Double = 0
        ) throws -> ModelBundle {
            let length = self.length
            var models = transformer ?? [
                "Transformer": StandIn.Model([
                    "x_t": .init([1, 2, 1, 2]), "t": .init([1]),
                    "text": .init([1, 1, 1, length], .float16), "mask": .init([1, length]),
                ]) { inputs in
                    precondition(!Thread.isMainThread)
                    Thread.sleep(forTimeInterval: pause)
                    let text = inputs["text"]!.reduce(0, +) / Float(length)
                    let sigma = inputs["t"]![0]
                    return ["v": inputs["x_t"]!.map { $0 / 2 + sigma + text }]
                }
            ]
            models["TextEncoder_0"] = StandIn.Model([
                "tokens": .init([1, length], .int32), "mask": .init([1, length]),
            ]) { inputs in
                ["text": inputs["tokens"]!.map { $0 / 1024 }]
            }
            models["Decoder"] = StandIn.Model(["latents": .init([1, 2, 1, 2])]) { inputs in
                ["picture": [Float](repeating: inputs["latents"]![0], count: 3 * 8 * 16)]
            }
            for name in models.keys {
                try FileManager.default.createDirectory(
                    at: folder.appendingPathComponent("\(name).mlmodelc"),
                    withIntermediateDirectories: true)
            }
            StandIn.use(models)
            return try ModelBundle(folder: folder)
        }

        private func options(
            steps: Int = 3, guidanceScale: Float = 1, previews: Bool = true
        ) -> Generator.Options {
            var options = Generator.Options()
            options.seed = 7
            options.steps = steps
            options.guidanceScale = guidanceScale
            options.previews = previews
            return options
        }

        private func steps(
            _ bundle: ModelBundle, _ options: Generator.Options
        ) async throws -> [Generator.Step] {
            var steps: [Generator.Step] = []
            for try await step in Generator(bundle: bundle).generate("a cat", options: options) {
                steps.append(step)
            }
            return steps
        }

        func testEveryStepIsShown() async throws {
            let bundle = try bundle()
            let found = try await steps(bundle, options())
            XCTAssertEqual(found.map(\.index), [0, 1, 2])
            XCTAssertEqual(found.map(\.isFinal), [false, false, true])
            let tokens = try bundle.tokenizer(0)("a cat").tokens
            let text = tokens.map { Float(Float16($0) / 1024) }.reduce(0, +) / Float(length)
            var denoising = Sampler.Denoising(
                noise: noise(seed: 7, draw: 0, channels: 2, height: 1, width: 2),
                schedule: Sampler.schedule(steps: 3, shift: bundle.config.sampling.timeShift))
            for step in found {
                let expected = try XCTUnwrap(
                    denoising.step { latents, sigma in
                        latents.map { $0 / 2 + Float(sigma) + text }
                    })
                let picture = try XCTUnwrap(step.picture)
                XCTAssertEqual([picture.width, picture.height], [16, 8])
                let value = min(max(expected.x0[0], -1), 1)
                XCTAssertEqual(Double(picture.bytes[0]), Double((value + 1) * 127.5), accuracy: 2)
                XCTAssertEqual(picture.bytes[3], 255)
            }
        }

        func testAComponentIsInMemoryOnlyWhileItIsNeeded() async throws {
            let bundle = try bundle()
            _ = try await steps(bundle, options(steps: 1, previews: false))
            XCTAssertEqual(
                StandIn.log,
                [
                    "load TextEncoder_0", "run TextEncoder_0", "ran TextEncoder_0",
                    "free TextEncoder_0", "load Transformer", "run Transformer",
                    "ran Transformer", "free Transformer", "load Decoder", "run Decoder",
                    "ran Decoder", "free Decoder",
                ])
        }

        func testGuidanceRunsTheNegativePromptToo() async throws {
            let bundle = try bundle()
            _ = try await steps(bundle, options(steps: 2, guidanceScale: 3))
            XCTAssertEqual(StandIn.log.filter { $0 == "run TextEncoder_0" }.count, 2)
            XCTAssertEqual(StandIn.log.filter { $0 == "run Transformer" }.count, 4)
        }

        func testChunksGetTheOutputsOfThoseBefore() async throws {
            let inputs: [String: StandIn.Input] = [
                "x_t": .init([1, 2, 1, 2]), "t": .init([1]), "text": .init([1, 1, 1, length]),
                "mask": .init([1, length]),
            ]
            let bundle = try bundle(transformer: [
                "Transformer_0": StandIn.Model(inputs) { ["hidden": $0["x_t"]!] },
                "Transformer_1": StandIn.Model(["hidden": .init([4])]) {
                    ["velocity": $0["hidden"]!]
                },
            ])
            let found = try await steps(bundle, options(steps: 2))
            XCTAssertEqual(found.count, 2)
        }

        func testCancelWaitsForTheRunningPrediction() async throws {
            let bundle = try bundle(pause: 0.3)
            let options = options(steps: 1000)
            let task = Task {
                for try await _ in Generator(bundle: bundle).generate("a cat", options: options) {}
            }
            while !StandIn.log.contains("run Transformer") {
                try await Task.sleep(for: .milliseconds(5))
            }
            task.cancel()
            do {
                try await task.value
                XCTFail("the loop ended as if it were complete")
            } catch is CancellationError {}
            let log = StandIn.log
            XCTAssertEqual(log.filter { $0 == "run Transformer" }.count, 1)
            XCTAssertEqual(log.filter { $0 == "ran Transformer" }.count, 1)
            XCTAssertTrue(log.contains("free Transformer"))
            try await Task.sleep(for: .milliseconds(400))
            XCTAssertEqual(StandIn.log.count, log.count)
        }

        func testALoopOfTheMainActorIsNotHeldUp() async throws {
            let bundle = try bundle()
            let options = options()
            let task = Task { @MainActor in
                var count = 0
                for try await step in Generator(bundle: bundle).generate("a cat", options: options)
                {
                    MainActor.assertIsolated()
                    count += step.picture == nil ? 0 : 1
                }
                return count
            }
            let count = try await task.value
            XCTAssertEqual(count, 3)
        }

        func testLeavingTheLoopStops() async throws {
            let bundle = try bundle()
            for try await _ in Generator(bundle: bundle).generate(
                "a cat", options: options(steps: 1000))
            {
                break
            }
            XCTAssertEqual(StandIn.log.filter { $0 == "run Transformer" }.count, 1)
            XCTAssertTrue(StandIn.log.contains("free Transformer"))
            XCTAssertTrue(StandIn.log.contains("free Decoder"))
        }

        func testMistakesAndBadNumbersAreErrors() async throws {
            let bundle = try bundle()
            for prompt in ["", " \n"] {
                do {
                    for try await _ in Generator(bundle: bundle).generate(prompt) {}
                    XCTFail("drew nothing")
                } catch let error as SnapGenError {
                    XCTAssertEqual(error.message, "the prompt is empty: say what to draw")
                }
            }
            let inputs: [String: StandIn.Input] = [
                "x_t": .init([1, 2, 1, 2]), "t": .init([1]), "text": .init([1, 1, 1, length]),
                "mask": .init([1, length]),
            ]
            let broken = try self.bundle(transformer: [
                "Transformer": StandIn.Model(inputs) { ["v": $0["x_t"]!.map { _ in .nan }] }
            ])
            do {
                _ = try await steps(broken, options())
                XCTFail("drew numbers that are not finite")
            } catch let error as SnapGenError {
                XCTAssertTrue(error.message.contains("not finite"), error.message)
            }
            XCTAssertTrue(StandIn.log.contains("free Transformer"))
        }
    }
#endif
