# embed.cmake - files as C arrays: cmake -DOUT=FILE.h -DFILES=a;b -P embed.cmake
#
# For a file view.js the array is view_js, ended by a 0 that is not part of its size.
set(text "/* made by frontends/embed.cmake; not to be edited */\n")
foreach(file ${FILES})
  get_filename_component(name ${file} NAME)
  string(MAKE_C_IDENTIFIER ${name} id)
  file(READ ${file} hex HEX)
  string(REGEX REPLACE "(..)" "0x\\1," bytes "${hex}")
  string(APPEND text "static const char ${id}[] = {\n${bytes}0\n};\n")
endforeach()
file(WRITE ${OUT} "${text}")
