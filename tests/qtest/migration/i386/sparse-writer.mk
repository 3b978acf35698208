# SPDX-License-Identifier: GPL-2.0-or-later
#
# Makes sparse-writer.h, the code as bytes and where its parameters are:
#   make -f sparse-writer.mk
# To specify cross compiler prefix, use CROSS_PREFIX=

.DELETE_ON_ERROR:

sparse-writer.h: sparse-writer.bin sparse-writer.o
	{ echo '/* SPDX-License-Identifier: GPL-2.0-or-later */'; \
	  echo '/* Generated from sparse-writer.S by sparse-writer.mk */'; \
	  echo; \
	  echo 'static const unsigned char sparse_writer[] = {'; \
	  xxd -i < $<; \
	  echo '};'; \
	  echo; \
	  $(CROSS_PREFIX)nm sparse-writer.o | \
	      awk '{ print "#define SPARSE_WRITER_" toupper($$3) " 0x" $$1 }'; \
	} > $@

# What is in front of the address that it runs at is not a part of it
sparse-writer.bin: sparse-writer.o
	$(CROSS_PREFIX)objcopy -O binary $< $@.tmp
	tail -c 1024 $@.tmp > $@
	rm -f $@.tmp

sparse-writer.o: sparse-writer.S
	$(CROSS_PREFIX)gcc -m32 -march=i686 -c $< -o $@
