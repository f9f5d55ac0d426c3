// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "SnapGen",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [.library(name: "SnapGen", targets: ["SnapGen"])],
    targets: [
        .target(name: "SnapGen"),
        .testTarget(name: "SnapGenTests", dependencies: ["SnapGen"]),
    ]
)
