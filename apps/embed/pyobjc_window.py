"""A model in an AppKit window, with PyObjC (pip install pyobjc-framework-Cocoa), on macOS.

python apps/embed/pyobjc_window.py [MODEL]
"""

import sys
import threading

import AppKit  # type: ignore[import-not-found]
import objc  # type: ignore[import-not-found]
from PyObjCTools import AppHelper  # type: ignore[import-not-found]

import mlx_stream

STYLE = AppKit.NSWindowStyleMaskTitled | AppKit.NSWindowStyleMaskClosable


class Delegate(AppKit.NSObject):
    def applicationDidFinishLaunching_(self, _notification):
        self.chat = self.engine.session(system="You are brief.")
        make = AppKit.NSWindow.alloc().initWithContentRect_styleMask_backing_defer_
        self.window = make(((200, 200), (480, 360)), STYLE, AppKit.NSBackingStoreBuffered, False)
        self.field = AppKit.NSTextField.alloc().initWithFrame_(((10, 10), (460, 24)))
        self.field.setTarget_(self)
        self.field.setAction_("ask:")
        self.text = AppKit.NSTextView.alloc().initWithFrame_(((10, 44), (460, 306)))
        for view in (self.field, self.text):
            self.window.contentView().addSubview_(view)
        self.window.makeKeyAndOrderFront_(None)

    def applicationShouldTerminateAfterLastWindowClosed_(self, _application):
        return True

    def ask_(self, _sender):
        question = str(self.field.stringValue())
        self.field.setStringValue_("")
        self.append(f"\n> {question}\n")
        threading.Thread(target=self.read, args=(question,), daemon=True).start()

    @objc.python_method
    def read(self, question):  # runs on its own thread, which waits for pieces
        try:
            for piece in self.chat.reply(question):  # a new question ends the reply
                AppHelper.callAfter(self.append, piece.text)  # only the main thread may draw
        except mlx_stream.errors.MlxStreamError as error:
            AppHelper.callAfter(self.append, f"[{error}]")

    @objc.python_method
    def append(self, text):
        self.text.textStorage().mutableString().appendString_(text)


if __name__ == "__main__":
    with mlx_stream.Engine(sys.argv[1] if len(sys.argv) > 1 else "starter") as engine:
        application = AppKit.NSApplication.sharedApplication()
        delegate = Delegate.alloc().init()
        delegate.engine = engine
        application.setDelegate_(delegate)
        AppHelper.runEventLoop()
