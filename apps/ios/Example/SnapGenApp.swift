import SnapGen
import SwiftUI

/// The smallest app around the package. Add this file and the folder "Model" (see README.md) to an
/// iOS app in Xcode, and the package as its dependency.
@main
struct SnapGenApp: App {
    var body: some Scene {
        WindowGroup { ContentView() }
    }
}

@MainActor
final class Drawing: ObservableObject {
    @Published var picture: CGImage?
    @Published var status = ""
    @Published var isRunning = false
    private var task: Task<Void, Never>?

    func start(_ prompt: String, seed: UInt64) {
        isRunning = true
        status = "Loading"
        picture = nil
        task = Task {
            do {
                try await draw(prompt, seed: seed)
                status = ""
            } catch is CancellationError {
                status = "Cancelled"
            } catch {
                status = error.localizedDescription
            }
            isRunning = false
        }
    }

    func cancel() {
        task?.cancel()
    }

    private func draw(_ prompt: String, seed: UInt64) async throws {
        guard let folder = Bundle.main.url(forResource: "Model", withExtension: nil) else {
            throw SnapGenError("the app has no folder Model: see README.md")
        }
        var options = Generator.Options()
        options.seed = seed
        let generator = Generator(bundle: try ModelBundle(folder: folder))
        for try await step in generator.generate(prompt, options: options) {
            picture = step.picture ?? picture
            status = "Step \(step.index + 1) of \(step.count)"
        }
        try Task.checkCancellation()
    }
}

struct ContentView: View {
    @StateObject private var drawing = Drawing()
    @State private var prompt = "a red apple"
    @State private var seed = 0

    var body: some View {
        VStack(spacing: 16) {
            Group {
                if let picture = drawing.picture {
                    Image(decorative: picture, scale: 1).resizable().scaledToFit()
                } else {
                    Color.secondary.opacity(0.1).aspectRatio(1, contentMode: .fit)
                }
            }
            .clipShape(RoundedRectangle(cornerRadius: 12))
            Text(drawing.status).font(.footnote).foregroundStyle(.secondary)
            TextField("What to draw", text: $prompt).textFieldStyle(.roundedBorder)
            Stepper("Seed \(seed)", value: $seed, in: 0...999)
            if drawing.isRunning {
                Button("Cancel", role: .cancel) { drawing.cancel() }
            } else {
                Button("Draw") { drawing.start(prompt, seed: UInt64(seed)) }
                    .buttonStyle(.borderedProminent)
            }
        }
        .padding()
    }
}
