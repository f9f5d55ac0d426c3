// swift-tools-version: 6.0
import PackageDescription

// Elsewhere than on Apple's systems, stand-ins of two frameworks let `swift test` run the package.
#if canImport(Darwin)
    let standIns: [String] = []
#else
    let standIns = ["CoreGraphics", "CoreML"]
#endif

let package = Package(
    name: "SnapGen",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [.library(name: "SnapGen", targets: ["SnapGen"])],
    targets: standIns.map { .target(name: $0, path: "Tests/StandIns/\($0)") } + [
        .target(name: "SnapGen", dependencies: standIns.map { .byName(name: $0) }),
        .testTarget(name: "SnapGenTests", dependencies: ["SnapGen"]),
    ],
    swiftLanguageModes: [.v6]
)
