/* Search in pages that are opened from a folder, where browsers start no workers: a worker in a hidden frame instead.
   The offline plugin of Material looks for a script of this name, and otherwise loads one from the network. */
if (location.protocol === "file:") {
  class IFrameWorker extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      this.frame = frame.contentWindow;
      this.frame.document.open();
      this.frame.document.write("<!doctype html><html><body></body></html>");
      this.frame.document.close();
      this.frame.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.isReady = new Promise((resolve, reject) => {
        const script = this.frame.document.createElement("script");
        script.src = String(url);
        script.onload = resolve;
        script.onerror = reject;
        this.frame.document.body.appendChild(script);
      });
    }

    postMessage(data) {
      this.isReady.then(() => this.frame.dispatchEvent(new this.frame.MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.frameElement.remove();
    }
  }
  window.IFrameWorker = IFrameWorker;
  window.Worker = IFrameWorker;
}
