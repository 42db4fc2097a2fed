# The runtime with the studio, on a CPU.
FROM python:3.12-slim
COPY . /source
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    "/source[studio,train,metrics,export,openvino]" && rm -r /source && useradd --create-home studio
USER studio
ENV PFSTORER_HOME=/home/studio/data
VOLUME /home/studio/data
EXPOSE 7860
ENTRYPOINT ["pfstorer-rt"]
CMD ["studio", "--no-open", "--host", "0.0.0.0"]
